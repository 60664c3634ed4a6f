"""Mixup and CutMix of neighbours in the global batch.

Position 2i of the global batch is mixed with position 2i + 1, both ways, by numbers drawn for (seed, step, i). A
micro-batch of even size begins at an even position, so a pair always lies in one micro-batch of one rank, and what is
mixed with what, and how, is the same for any number of ranks and any accumulation. Neighbours are as good as strangers:
each stream is shuffled again in every epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.draws import Counter, Draw, uniform
from dist_train.data.loader import Batch

_RATIO, _ANGLE, _CHOICE, _ROW, _COLUMN = range(5)


@dataclass(frozen=True)
class Mix:
    """What the samples of a mixed batch are: share (B,) of its own label each, the rest of its partner's (B,); or of
    its own tags and its partner's (B, tags)."""

    partner_labels: Tensor
    share: Tensor


def symmetric_beta(alpha: float, *counters: Counter) -> NDArray[np.float64]:
    """A draw from Beta(alpha, alpha) for each combination of the counters, by the polar method for Student's t with
    2 alpha degrees of freedom (Bailey 1994): T / sqrt(2 alpha + T^2) is 2 Beta(alpha, alpha) - 1."""
    radius = 1 - uniform(*counters, _RATIO)  # in (0, 1]
    cosine = np.cos(2 * np.pi * uniform(*counters, _ANGLE))
    with np.errstate(over="ignore", divide="ignore"):
        squared = (radius ** (-1 / alpha) - 1) * cosine**2  # T^2 / (2 alpha)
        return (1 + np.sign(cosine) / np.sqrt(1 + 1 / squared)) / 2


def mix_neighbours(config: DataConfig, batch: Batch, seed: int, step: int, position: int) -> tuple[Batch, Mix | None]:
    """The batch with its samples 2i and 2i + 1 mixed. `position`: of its first sample in the global batch.

    A pair with a sample that cannot be used stays as it is.
    """
    if not (config.mixup or config.cutmix):
        return batch, None
    size, device = batch.images.shape[-1], batch.images.device
    pairs = (position + np.arange(0, len(batch.labels), 2)) // 2
    cut = uniform(seed, Draw.MIXING, step, pairs, _CHOICE) < (0.5 if config.mixup else 1.0)
    cut &= config.cutmix > 0
    blend = symmetric_beta(config.mixup, seed, Draw.MIXING, step, pairs) if config.mixup else np.ones(len(pairs))
    top, bottom, left, right = _boxes(config.cutmix, size, seed, step, pairs) if config.cutmix else np.zeros((4, 1))
    area = (bottom - top) * (right - left) / size**2
    usable = (batch.weights.view(-1, 2) > 0).all(dim=1).repeat_interleave(2)

    def per_sample(values: NDArray[np.generic]) -> Tensor:
        both = np.repeat(np.broadcast_to(values, len(pairs)), 2)
        return torch.from_numpy(both).to(device, batch.images.dtype, non_blocking=True)

    share = torch.where(usable, per_sample(np.where(cut, 1 - area, blend)), 1)
    own = share.view(-1, 1, 1, 1)
    if config.cutmix:
        pixel = torch.arange(size, device=device)
        top, bottom, left, right = (per_sample(edge).view(-1, 1) for edge in (top, bottom, left, right))
        rows, columns = (pixel >= top) & (pixel < bottom), (pixel >= left) & (pixel < right)
        inside = (rows[:, None, :, None] & columns[:, None, None, :]) & usable.view(-1, 1, 1, 1)
        own = torch.where(per_sample(cut).view(-1, 1, 1, 1) > 0, (~inside).to(own.dtype), own)
    partner = batch.images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    mixed = replace(batch, images=torch.lerp(partner, batch.images, own))
    return mixed, Mix(batch.targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1), share)


def _boxes(alpha: float, size: int, seed: int, step: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Top, bottom, left, right of each pair's box, pixels, (4, pairs): its area a share from Beta(alpha, alpha) of the
    image's, its centre anywhere, and what of it is outside cut off (Yun et al. 2019, algorithm A1)."""
    side = np.sqrt(symmetric_beta(alpha, seed, Draw.MIXING, step, pairs)) * size
    edges = []
    for what in (_ROW, _COLUMN):
        centre = uniform(seed, Draw.MIXING, step, pairs, what) * size
        edges += [centre - side / 2, centre + side / 2]
    return np.clip(np.rint(edges), 0, size).astype(np.int64)
