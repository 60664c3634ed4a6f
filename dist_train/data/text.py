"""Tags to WordPiece ids and mask."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dist_train.errors import UseError, WorkError


class TagTokenizer:
    """bert-base-uncased WordPiece (or another vocabulary): [CLS] tags [SEP], cut and padded to a fixed length."""

    def __init__(self, name_or_file: str, tokens: int) -> None:
        """name_or_file: a tokenizer on the hub, or a vocab.txt with one token a line."""
        from transformers import AutoTokenizer, BertTokenizerFast

        self.tokens = tokens
        path = Path(name_or_file)
        if path.is_file():
            vocabulary = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
            missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]
            if missing:
                raise UseError(f"{path}: not a WordPiece vocabulary, it lacks {', '.join(missing)}")
            self._tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True)
        elif name_or_file.endswith(".txt") or (os.sep in name_or_file and path.parent.exists()):
            raise UseError(f"data.tokenizer {name_or_file}: no such file")
        else:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name_or_file, use_fast=True)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise WorkError(
                    f"data.tokenizer {name_or_file}: neither a vocabulary file nor to be had from the hub ({reason}); "
                    "set data.tokenizer to a vocab.txt"
                ) from None

    @property
    def vocab_size(self) -> int:
        """Rows that a table of word embeddings needs."""
        return len(self._tokenizer)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of B lines of tags: (B, tokens) int64, and bool that is True at real tokens."""
        if not texts:
            return torch.zeros(0, self.tokens, dtype=torch.int64), torch.zeros(0, self.tokens, dtype=torch.bool)
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()
