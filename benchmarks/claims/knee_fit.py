"""Where a larger batch begins to cost loss, from the losses of branches that all saw the same samples, and how surely.

Losses are arrays (seeds, batches), batches ascending. Seeds are pairs: the branches of a seed saw the same samples, so
each is compared with the smallest batch of its own seed.

The knee is a batch by a tolerance. The fitted batch is that of McCandlish et al. 2018 (arXiv 1812.06162, equations 2.7
and 2.11): where batch b gains per step 1 / (1 + B / b) of what the exact gradient would gain, it gains per sample
1 / (1 + b / B) of what the smallest would; B is the batch at which twice the samples are needed, and what the gradient
noise scale predicts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DRAWS = 4000
"""Of the bootstrap."""
CONFIDENCE = 0.9
"""Of the intervals: each end is passed in one of twenty cases, as in the study's comparisons."""
_REACH, _PER_OCTAVE = 4, 16  # the fit looks this many octaves beyond the measured batches, in so fine steps


@dataclass(frozen=True)
class Found:
    """A batch size with its interval; infinite: beyond the largest measured; NaN ends: one seed says nothing of it."""

    value: float
    low: float
    high: float


def excess(losses: Floats) -> Floats:
    """(seeds, batches): how much higher each loss is than that of the smallest batch of the same seed. A loss that is
    not finite counts as infinitely high."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    if not np.isfinite(losses[:, 0]).all():
        raise ValueError("the smallest batch has no finite loss to compare with")
    return losses - losses[:, :1]


def find_knee(losses: Floats, batches: Sequence[int], tolerance: float) -> Found:
    """The largest batch whose mean excess is not above the tolerance (a loss, not negative), interpolated on log2."""
    differences = excess(losses)
    knees = crossing(np.vstack([differences.mean(axis=0), bootstrap_means(differences)]), batches, tolerance)
    return _found(knees, len(losses))


def better_than_smallest(losses: Floats, batches: Sequence[int]) -> int | None:
    """The batch of the lowest mean loss, if it is lower than that of the smallest batch by a test that is wrong of one
    batch in one of twenty cases; with one seed None. The rate was then low for the smallest batch, and a larger one
    made up for it. As the best of all is tested, six batches that are equally good are doubted in one case in seven.
    """
    differences = excess(losses)
    best = int(np.argmin(differences.mean(axis=0)))
    draws = bootstrap_means(differences)[:, best]
    sure = len(draws) > 0 and float(np.quantile(draws, (1 + CONFIDENCE) / 2)) < 0
    return batches[best] if sure else None


def crossing(differences: Floats, batches: Sequence[int], tolerance: float) -> Floats:
    """(rows,): of each row of (rows, batches), the largest batch at which the line through its points, straight over
    log2 of the batch, is not above the tolerance. Infinite where that is the last point; next to an infinite excess it
    is the batch before. The first point must not be above."""
    last = differences.shape[1] - 1
    within = differences <= tolerance
    at = last - np.argmax(within[:, ::-1], axis=1)
    after = np.minimum(at + 1, last)
    rows = np.arange(len(differences))
    here, there = differences[rows, at], differences[rows, after]
    rise = np.where(at < last, there - here, 1.0)
    share = np.where(np.isfinite(rise), (tolerance - here) / rise, 0.0)
    octave = np.log2(np.asarray(batches, np.float64))
    return np.where(at == last, np.inf, np.exp2(octave[at] + share * (octave[after] - octave[at])))


def fit_critical(losses: Floats, batches: Sequence[int], start: float) -> Found:
    """The batch B of gain(b) = gain(0) / (1 + b / B), by least squares over the mean gains since the branch point.

    start: the loss there. Batches at which a seed diverged are left out. 0 and infinite: smaller or larger than the fit
    can tell; NaN: fewer than three batches are left, or the smallest gains nothing.
    """
    whole = np.isfinite(losses).all(axis=0)
    gains = start - losses[:, whole]
    sizes = np.asarray(batches, np.float64)[whole]
    if len(sizes) < 3 or gains[:, 0].mean() <= 0:
        return Found(math.nan, math.nan, math.nan)
    return _found(_fit(np.vstack([gains.mean(axis=0), bootstrap_means(gains)]), sizes), len(losses))


def _fit(gains: Floats, sizes: Floats) -> Floats:
    """(rows,): B of each row of gains (rows, batches); 0 below and infinite above what can be told apart."""
    low, high = np.log2(sizes[0]) - _REACH, np.log2(sizes[-1]) + _REACH
    candidates = np.exp2(np.linspace(low, high, 1 + round((high - low) * _PER_OCTAVE)))
    shapes = 1 / (1 + sizes / candidates[:, None])
    shapes /= np.linalg.norm(shapes, axis=1, keepdims=True)
    # The residual of a row is what of it does not lie along the shape.
    along = gains @ shapes.T
    best = np.argmax(np.where(along > 0, along, -np.inf), axis=1)
    found = candidates[best]
    found = np.where(best == 0, 0.0, np.where(best == len(candidates) - 1, np.inf, found))
    return np.where(along.max(axis=1) > 0, found, np.inf)


def bootstrap_means(values: Floats) -> Floats:
    """(DRAWS, columns): draws of the mean over the rows, which stay whole.

    Deviations of the rows from their mean are weighed by normal numbers, and each draw divided by the root of a
    chi-square over its degrees of freedom: for one column this is Student's t, exact for normal deviations, where a
    bootstrap that takes rows again would be far too sure of three seeds. None for a single row.
    """
    count = len(values)
    if count < 2:
        return np.empty((0, values.shape[1]))
    generator = np.random.default_rng(0)  # the same answer to the same rows
    diverged = ~np.isfinite(values).all(axis=0)
    mean = np.where(diverged, 0.0, np.where(diverged, 0.0, values).mean(axis=0))
    deviations = np.where(diverged, 0.0, values) - mean
    spread = generator.standard_normal((DRAWS, count)) @ deviations / math.sqrt(count * (count - 1))
    draws = mean + spread / np.sqrt(generator.chisquare(count - 1, (DRAWS, 1)) / (count - 1))
    return np.where(diverged, np.inf, draws)


def _found(values: Floats, seeds: int) -> Found:
    """The first of the values, and the interval of the others."""
    if seeds < 2:
        return Found(float(values[0]), math.nan, math.nan)
    ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    # Of sorted values, without interpolation: some of them may be infinite.
    low, high = np.quantile(values[1:], ends, method="nearest")
    return Found(float(values[0]), float(low), float(high))
