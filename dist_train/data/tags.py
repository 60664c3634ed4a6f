"""What a line of tags is: one rule for sidecar files, CSV columns, members of tars and `predict --tags`."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from dist_train.data.draws import Draw, random_bits


def tag_line(text: str) -> str:
    """The tags of a text on one line, separated by single blanks, with "_" for the blanks inside a tag.

    Tags are separated by commas or ends of lines; a text with neither is a line of tags separated by blanks. A tagger's
    backslashes before a bracket, byte-order marks and blanks around tags are dropped. A line made by this rule is left
    as it is by it.
    """
    text = text.replace("\ufeff", "").strip()
    if "\\" in text:
        text = re.sub(r"\\+([()])", r"\1", text)
    if "," not in text and "\n" not in text and "\r" not in text:
        return " ".join(text.split())
    tags = ("_".join(tag.split()) for tag in re.split(r"[,\r\n]", text))
    return " ".join(tag for tag in tags if tag)


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
