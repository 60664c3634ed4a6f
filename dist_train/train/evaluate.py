"""Accuracy of a model on one split, counted in integers, each sample exactly once at any world size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_train.data.features import FeatureEvalLoader
from dist_train.data.loader import Batch, EvalLoader
from dist_train.errors import WorkError

Forward = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Evaluation:
    """Counts over a whole split by true class, (classes,) int64 each; loss is the mean cross-entropy.

    bad_samples: samples of the split that could not be used, and are in none of the counts.
    """

    correct: Tensor
    top5_correct: Tensor
    seen: Tensor
    loss: float
    bad_samples: int

    @property
    def samples(self) -> int:
        """Samples counted."""
        return int(self.seen.sum())

    @property
    def top1(self) -> float:
        """Share of samples whose class came first."""
        return int(self.correct.sum()) / self.samples

    @property
    def top5(self) -> float:
        """Share of samples whose class was among the first five."""
        return int(self.top5_correct.sum()) / self.samples

    @property
    def score(self) -> float:
        """By which the best checkpoint is chosen."""
        return self.top1

    def figures(self) -> dict[str, Any]:
        """As metrics.jsonl and summary.json hold it."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "class_mean": self.class_mean(),
            "loss": self.loss,
            "samples": self.samples,
            "bad_samples": self.bad_samples,
        }

    def class_mean(self, classes: Tensor | None = None) -> float:
        """Mean of the classes' own accuracies, over those seen (of `classes`, ids, if given)."""
        chosen = self.seen > 0
        if classes is not None:
            chosen &= torch.isin(torch.arange(len(self.seen)), classes)
        return float((self.correct[chosen].double() / self.seen[chosen]).mean())


def padded(batch: Batch, size: int) -> Batch:
    """The batch with zeros behind its samples, `size` samples in all."""
    missing = size - len(batch.labels)
    if missing == 0:
        return batch

    def pad(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    optional = (batch.text_ids, batch.text_mask, batch.tags)
    ids, mask, tags = (None if part is None else pad(part) for part in optional)
    samples = np.concatenate([batch.samples, np.full(missing, -1)])
    return Batch(pad(batch.images), pad(batch.labels), pad(batch.weights), ids, mask, samples, tags)


@torch.no_grad()
def evaluate(
    forward: Forward,
    loader: EvalLoader | FeatureEvalLoader,
    expected_samples: int,
    each: Callable[[Batch, Tensor], None] | None = None,
) -> Evaluation:
    """Evaluate over all ranks (each calls this); `forward` gives the logits of a batch.

    each: is shown every batch of this rank with its logits (B, classes), float32.

    A sample that cannot be used is not counted but reported. Raises WorkError if the samples counted and reported are
    not `expected_samples`, or none could be used.
    """
    classes = len(loader.manifest.classes)
    sums: tuple[Tensor, Tensor, Tensor] | None = None
    for batch in loader:
        # All passes have one shape: a compiled model would be compiled again for a short last batch.
        logits = forward(padded(batch, loader.batch_size))[: len(batch.labels)].float()
        if sums is None:
            counts = torch.zeros(3, classes, dtype=torch.int64, device=logits.device)
            sums = counts, torch.zeros_like(counts[0, 0], dtype=torch.float64), torch.zeros_like(counts[0, 0])
        counts, loss_sum, bad = sums
        if each is not None:
            each(batch, logits)
        valid = batch.weights > 0
        best = logits.topk(min(5, classes), dim=1).indices
        hits = (best == batch.labels[:, None]) & valid[:, None]
        for row, found in enumerate((hits[:, 0], hits.any(dim=1), valid)):
            counts[row] += torch.bincount(batch.labels[found], minlength=classes)
        bad += (~valid).sum()
        loss_sum += functional.cross_entropy(logits[valid], batch.labels[valid], reduction="sum").double()
    if sums is None:
        raise WorkError("the split to evaluate on holds no samples")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
    counts, loss_sum, bad = sums
    correct, top5_correct, seen = counts.cpu()
    samples = int(seen.sum())
    check_counts(samples, int(bad), expected_samples)
    return Evaluation(correct, top5_correct, seen, float(loss_sum) / samples, int(bad))


def check_counts(samples: int, bad: int, expected: int) -> None:
    """Raise WorkError where the samples that an evaluation has counted, and left out as bad, are not those of the
    manifest, or where it has counted none."""
    if samples + bad != expected:
        raise WorkError(
            f"evaluation counted {samples} samples and left out {bad} bad ones, the manifest has {expected}"
        )
    if not samples:
        raise WorkError("no sample of the split to evaluate on can be used; check it with `python -m shards verify`")
