"""Lines of tags (`tags.py`) to token ids and mask.

As a line is cut at model.text_tokens, the order of its tags decides which are lost (data.tag_order).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_train.data.vocabulary import WHOLE_TAGS, read_vocabulary
from dist_train.errors import WorkError

_PADDING, _UNKNOWN, _FIRST_TAG = 0, 1, 2  # ids of whole tags


class TagTokenizer:
    """WordPiece (bert-base-uncased or another vocabulary), [CLS] tags [SEP], or one token a tag; cut and padded."""

    def __init__(
        self, name_or_file: str, tokens: int, frequent_tags: Sequence[str] = (), by_frequency: bool = False
    ) -> None:
        """name_or_file: a tokenizer on the hub, a vocab.txt with one token a line, or `tags` for one token a tag.

        tokens: length that each line of tags is cut and padded to. frequent_tags: most frequent first; the vocabulary
        of whole tags. by_frequency: put the tags of a line into that order before it is cut, unknown ones last.
        """
        self._rank = {tag: i for i, tag in enumerate(frequent_tags)}
        self._by_frequency = by_frequency
        self._whole_tags = name_or_file == WHOLE_TAGS
        self.tokens = tokens
        self._says_nothing = torch.tensor([_PADDING, _UNKNOWN])
        if self._whole_tags:
            return

        from transformers import AutoTokenizer, BertTokenizerFast

        vocabulary = read_vocabulary(name_or_file)
        if vocabulary is not None:
            self._tokenizer = BertTokenizerFast(vocab=vocabulary, do_lower_case=True)
        else:
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name_or_file, use_fast=True)
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise WorkError(
                    f"data.tokenizer {name_or_file}: neither a vocabulary file nor available from the hub ({reason}); "
                    "set data.tokenizer to a vocab.txt"
                ) from None
        self._says_nothing = torch.tensor(self._tokenizer.all_special_ids)

    @property
    def vocab_size(self) -> int:
        """Rows that a table of word embeddings needs."""
        if self._whole_tags:
            return _FIRST_TAG + len(self._rank)
        return 1 + max(self._tokenizer.get_vocab().values())  # more than there are, where a token stands twice

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(ids, mask) of B lines of tags: (B, tokens) int64, and bool that is True at real tokens."""
        if self._by_frequency:
            last = len(self._rank)
            texts = [" ".join(sorted(text.split(), key=lambda tag: self._rank.get(tag, last))) for text in texts]
        if self._whole_tags or not texts:
            return self._ids_of_whole_tags(texts)
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()

    def without_known_tags(self, texts: list[str], ids: Tensor) -> list[int]:
        """Places of the lines that have tags, none of which the model knows; ids: what `texts` became, (B, tokens)."""
        unknown = torch.isin(ids, self._says_nothing).all(dim=1).tolist()
        return [i for i, nothing in enumerate(unknown) if nothing and texts[i].strip()]

    def describe(self) -> dict[str, Any]:
        """What makes ids and mask of a line of tags, for another program, as JSON has it.

        `tags`, in order, have the ids from 2 on; a tag that is not among them has 1, padding 0. Else `tokenizer` is
        what the tokenizers library reads, and in `sort_by` are the tags that come first, in this order, if any do.
        """
        if self._whole_tags:
            return {"tokens": self.tokens, "tags": list(self._rank), "sort_by_frequency": self._by_frequency}
        encoder = json.loads(self._tokenizer.backend_tokenizer.to_str())
        return {"tokens": self.tokens, "tokenizer": encoder, "sort_by": list(self._rank) if self._by_frequency else []}

    def _ids_of_whole_tags(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.tokens, dtype=torch.int64)
        for row, text in enumerate(texts):
            known = [self._rank.get(tag, _UNKNOWN - _FIRST_TAG) for tag in text.split()[: self.tokens]]
            ids[row, : len(known)] = _FIRST_TAG + torch.tensor(known, dtype=torch.int64)
        return ids, ids > 0
