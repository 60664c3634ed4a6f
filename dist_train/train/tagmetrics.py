"""How well probabilities of tags fit: average precision, the threshold of the highest F1, and counts at a threshold.

All of it follows from which of the samples come before which, ties as one, and is exact: no bins, no sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Hits:
    """What thresholds make of a split; (T,) each: predicted is the number of samples at or above a tag's threshold,
    hits those of them that have the tag, positives all that have it."""

    thresholds: Floats
    hits: Counts
    predicted: Counts
    positives: Counts

    @property
    def precision(self) -> Floats:
        """Of each tag, 0 where nothing is predicted."""
        return _ratio(self.hits, self.predicted)

    @property
    def recall(self) -> Floats:
        """Of each tag, 0 where no sample has it."""
        return _ratio(self.hits, self.positives)

    @property
    def f1(self) -> Floats:
        """Of each tag: the harmonic mean of precision and recall, 0 where nothing is hit."""
        return _ratio(2 * self.hits, self.predicted + self.positives)

    def figures(self) -> dict[str, float]:
        """Precision, recall and F1, micro (of all decisions together) and macro (mean over the tags that occur)."""
        hits, predicted, positives = (int(counts.sum()) for counts in (self.hits, self.predicted, self.positives))
        occur = self.positives > 0
        return {
            "precision_micro": hits / max(1, predicted),
            "recall_micro": hits / max(1, positives),
            "f1_micro": 2 * hits / max(1, predicted + positives),
            "precision_macro": mean_over(self.precision, occur),
            "recall_macro": mean_over(self.recall, occur),
            "f1_macro": mean_over(self.f1, occur),
        }


def mean_over(values: Floats, chosen: NDArray[np.bool_]) -> float:
    """The mean of the chosen values; 0 if there are none."""
    return float(values[chosen].mean()) if chosen.any() else 0.0


def _ratio(part: Counts, whole: Counts) -> Floats:
    return part / np.maximum(1, whole)


def probabilities(logits: Tensor) -> Tensor:
    """Of each tag on its own, float64. Whatever is compared with a threshold is made here: float32 would have 1 for all
    logits above 17."""
    return logits.double().sigmoid()


def count_hits(scores: Floats, truth: NDArray[np.bool_], thresholds: Floats) -> Hits:
    """Counts at a threshold for each tag; scores and truth (T, N), thresholds (T,)."""
    predicted = scores >= thresholds[:, None]
    return Hits(thresholds, (predicted & truth).sum(axis=1), predicted.sum(axis=1), truth.sum(axis=1))


def ranked(scores: Floats, truth: NDArray[np.bool_], default: float) -> tuple[Floats, Floats]:
    """(average precision, threshold of the highest F1) of each tag, (T,) each; scores and truth (T, N).

    Average precision is scikit-learn's: the sum over the distinct scores, from the highest down, of the precision there
    times the gain in recall; 0 for a tag that no sample has. A threshold lies midway between the last score that is
    taken and the next, so that neither is at its edge; among equally good ones it is the highest. A tag that no sample
    has tells nothing and gets `default`.
    """
    tags, samples = scores.shape
    if not samples:
        return np.zeros(tags), np.full(tags, default)
    order = np.argsort(-scores, axis=1)
    scores, truth = np.take_along_axis(scores, order, axis=1), np.take_along_axis(truth, order, axis=1)
    hits, taken = np.cumsum(truth, axis=1), np.arange(1, samples + 1)
    positives = hits[:, -1]
    # Equal scores are taken together, so only what stands at the last of them counts, and not their order.
    last = np.ones(scores.shape, bool)
    last[:, :-1] = scores[:, :-1] != scores[:, 1:]
    before = np.zeros_like(hits)
    before[:, 1:] = np.maximum.accumulate(np.where(last, hits, 0), axis=1)[:, :-1]
    gain = np.where(last, hits - before, 0)
    average_precision = (gain * (hits / taken)).sum(axis=1) / np.maximum(1, positives)

    f1 = np.where(last, 2 * hits / (taken + positives[:, None]), -1)
    best = f1.argmax(axis=1)  # the first of equal ones
    rows = np.arange(tags)
    lowest = scores[rows, best]
    below = np.where(best + 1 < samples, scores[rows, np.minimum(best + 1, samples - 1)], 0)
    midway = (lowest + below) / 2
    thresholds = np.where(midway > below, midway, lowest)  # neighbours among the floats have nothing between them
    return average_precision, np.where(positives > 0, thresholds, default)
