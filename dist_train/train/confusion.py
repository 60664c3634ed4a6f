"""Which class was taken for which: what an evaluation can collect beside its counts."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.data.loader import Batch


def first_choice(logits: Tensor) -> Tensor:
    """The predicted class of each row, (B,), also among equal logits that which `evaluate` takes."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices[:, 0]


class ConfusionCounts:
    """Counts the samples of each pair of true and predicted class, batch by batch, in integers."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._counts: Tensor | None = None

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Count a batch, without the samples that cannot be used. logits: (B, classes)."""
        if self._counts is None:
            self._counts = torch.zeros(self.classes**2, dtype=torch.int64, device=logits.device)
        pairs = batch.labels.to(logits.device) * self.classes + first_choice(logits)
        self._counts.scatter_add_(0, pairs, (batch.weights.to(logits.device) > 0).to(torch.int64))

    def over_ranks(self) -> Tensor:
        """(classes, classes) int64 on the CPU: samples of true class (row) and predicted class (column), of all ranks,
        each of which calls this and has evaluated."""
        assert self._counts is not None
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._counts)
        return self._counts.view(self.classes, self.classes).cpu()
