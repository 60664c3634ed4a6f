"""Tags to token ids and mask, and the order in which they come.

The tags of a sample stand on one line, separated by blanks (`tags.tag_line`). As the line is cut at model.text_tokens,
the order decides which tags are lost (data.tag_order).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.draws import Draw, random_bits
from dist_train.data.fetch import ShardFetcher
from dist_train.data.manifest import Manifest, check_has_tags
from dist_train.data.plan import evaluation_batches, needs_of
from dist_train.data.readahead import open_remote
from dist_train.data.vocabulary import WHOLE_TAGS, read_vocabulary
from dist_train.errors import WorkError

TAGS_NAME = "tags.txt"
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
                    f"data.tokenizer {name_or_file}: neither a vocabulary file nor to be had from the hub ({reason}); "
                    "set data.tokenizer to a vocab.txt"
                ) from None
        self._says_nothing = torch.tensor(self._tokenizer.all_special_ids)

    @property
    def vocab_size(self) -> int:
        """Rows that a table of word embeddings needs."""
        return _FIRST_TAG + len(self._rank) if self._whole_tags else len(self._tokenizer)

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

    def _ids_of_whole_tags(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), self.tokens, dtype=torch.int64)
        for row, text in enumerate(texts):
            known = [self._rank.get(tag, _UNKNOWN - _FIRST_TAG) for tag in text.split()[: self.tokens]]
            ids[row, : len(known)] = _FIRST_TAG + torch.tensor(known, dtype=torch.int64)
        return ids, ids > 0


def shuffle_tags(texts: list[str], seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> list[str]:
    """Lines of tags in random order, a pure function of (seed, epoch, sample) of each; (B,) each."""
    lines = [text.split() for text in texts]
    lengths = np.array([len(line) for line in lines], np.int64)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lines)), lengths)
    place = np.arange(len(row)) - (ends - lengths)[row]
    order = np.lexsort((random_bits(seed, Draw.TAG_ORDER, epochs[row], samples[row], place), row))
    tags = [tag for line in lines for tag in line]
    return [" ".join(tags[i] for i in order[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def find_frequent_tags(config: DataConfig, manifest: Manifest) -> list[str]:
    """The data.tag_vocabulary most frequent tags of the train split, most frequent first, ties in order of code points.

    Exact: reads each sample's tags once, about half a minute for a million samples on a local disk.
    """
    check_has_tags(config, manifest)
    split = manifest.split("train")
    remote = open_remote(config, split.shards, local_world_size=1)
    fetcher = ShardFetcher(config.shards, split, len(manifest.classes), remote=remote, texts_only=True)
    counts: Counter[str] = Counter()
    batches = evaluation_batches(split.shard_samples, 4096, rank=0, world_size=1)
    with fetcher.following(lambda: needs_of(batches)):
        for i, positions in enumerate(batches):
            fetcher.advance(i)
            for text in fetcher.fetch(positions, with_text=True).texts:
                counts.update(set(text.split()))
    return sorted(counts, key=lambda tag: (-counts[tag], tag))[: config.tag_vocabulary]


def read_frequent_tags(run: Path) -> list[str]:
    """The tags that a run found most frequent. Raises WorkError where it has no list of them."""
    try:
        return (run / TAGS_NAME).read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise WorkError(f"{run / TAGS_NAME}: cannot be read ({error}); the model reads tags by this list") from None
