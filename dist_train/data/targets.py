"""Lines of tags (`tags.py`) to what a model that predicts tags is trained for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TagTargets:
    """Which of the tags that a model knows a sample has."""

    def __init__(self, tags: Sequence[str]) -> None:
        """tags: in the order of the model's outputs."""
        self.tags = list(tags)
        self._output = {tag: i for i, tag in enumerate(self.tags)}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, tags) bool of B lines of tags. A line of none that are known is all False."""
        known = [[self._output[tag] for tag in text.split() if tag in self._output] for text in texts]
        targets = torch.zeros(len(texts), len(self.tags), dtype=torch.bool)
        rows = torch.repeat_interleave(torch.tensor([len(line) for line in known], dtype=torch.int64))
        targets[rows, torch.tensor([i for line in known for i in line], dtype=torch.int64)] = True
        return targets
