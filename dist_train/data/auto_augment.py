"""RandAugment and TrivialAugment: which operations an image gets, and how strong; a function of drawn numbers.

Operations, their ranges and the 31 magnitudes are those of torchvision's RandAugment (Cubuk et al. 2020) and
TrivialAugmentWide (Müller and Hutter 2021), and so is what they do to whole numbers (`operations.py`, and
`operations_torch.py` on a GPU): neighbours are taken as they are, without interpolation, and what comes from outside of
the image is black.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dist_train.config import AutoAugment, DataConfig

BINS = 31
NUMBERS = 3
"""Random numbers that an operation takes: which, its sign, its magnitude."""


class Operation(IntEnum):
    """In torchvision's order, in which one is drawn."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    BRIGHTNESS = 6
    COLOR = 7
    CONTRAST = 8
    SHARPNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


_SIGNED = np.arange(Operation.SHEAR_X, Operation.SHARPNESS + 1)


def operations_per_image(config: DataConfig) -> int:
    """How many an image gets, one after the other."""
    return {"none": 0, "randaugment": config.randaugment_ops, "trivialaugment": 1}[config.auto_augment]


def choose_operations(config: DataConfig, drawn: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(B, n) operations and their magnitudes: shear as a tangent, pixels, degrees, what is added to a factor of 1, bits
    that are kept, or the share of white from which colours are inverted.

    drawn: (NUMBERS * n, B) in [0, 1).
    """
    kinds, signs, bins = drawn.reshape(-1, NUMBERS, drawn.shape[1]).transpose(1, 2, 0)
    operations = np.ascontiguousarray(kinds * len(Operation), np.int64)
    chosen = np.full(kinds.shape, config.randaugment_magnitude)
    if config.auto_augment == "trivialaugment":
        chosen = (bins * BINS).astype(np.int64)
    magnitudes = magnitude_table(config.auto_augment, config.image_size)[operations, chosen]
    signed = np.where((signs < 0.5) & np.isin(operations, _SIGNED), -magnitudes, magnitudes)
    return operations, np.ascontiguousarray(signed)


@cache
def magnitude_table(policy: AutoAugment, side: int) -> NDArray[np.float64]:
    """(operations, BINS) magnitudes for images of this side, without their signs."""
    wide = policy == "trivialaugment"
    highest: dict[int, float] = {
        Operation.SHEAR_X: 0.99 if wide else 0.3,
        Operation.SHEAR_Y: 0.99 if wide else 0.3,
        Operation.TRANSLATE_X: 32.0 if wide else 150 / 331 * side,
        Operation.TRANSLATE_Y: 32.0 if wide else 150 / 331 * side,
        Operation.ROTATE: 135.0 if wide else 30.0,
    }
    highest |= dict.fromkeys(range(Operation.BRIGHTNESS, Operation.SHARPNESS + 1), 0.99 if wide else 0.9)
    table = np.zeros((len(Operation), BINS), np.float32)
    for operation, end in highest.items():
        table[operation] = _linspace(0.0, end)
    for operation in (Operation.TRANSLATE_X, Operation.TRANSLATE_Y):
        table[operation] = np.trunc(table[operation])
    table[Operation.POSTERIZE] = np.rint(8 - np.arange(BINS) / np.float32((BINS - 1) / (6 if wide else 4)))
    table[Operation.SOLARIZE] = _linspace(1.0, 0.0)
    return table.astype(np.float64)


def _linspace(start: float, end: float) -> NDArray[np.float32]:
    """As torch computes it: in float32, the product fused, from both ends to the middle. Another last bit would be
    another pixel of a translation."""
    steps, first, last = np.arange(BINS, dtype=np.float64), np.float32(start), np.float32(end)
    step = (last - first) / np.float32(BINS - 1)
    rising, falling = np.float64(first) + step * steps, np.float64(last) - step * steps[::-1]
    return np.where(steps < BINS // 2, rising, falling).astype(np.float32)


def affine_maps(operations: NDArray[np.int64], magnitudes: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """(B, n, 6) rows (of x, then of y) that lead from a pixel's place in the result to its place in the image.

    Places count from the image's centre; pixels in, [-1, 1] from edge to edge out. Operations that move nothing have
    the identity.
    """
    half = side / 2
    shear_x, shear_y, angle = (
        np.where(operations == kind, magnitudes, 0.0)
        for kind in (Operation.SHEAR_X, Operation.SHEAR_Y, Operation.ROTATE)
    )
    # torchvision takes the tangent of a rounded arc tangent in degrees. Shears are about the upper left corner.
    shear_x, shear_y = (np.tan(np.radians(np.degrees(np.arctan(shear)))) for shear in (shear_x, shear_y))
    angle = np.radians(-(angle % 360))
    maps = np.zeros((*operations.shape, 6))
    maps[..., 0] = maps[..., 4] = np.cos(angle)
    maps[..., 1], maps[..., 3] = np.sin(angle) + shear_x, -np.sin(angle) + shear_y
    maps[..., 2] = np.where(operations == Operation.TRANSLATE_X, -magnitudes, shear_x * half)
    maps[..., 5] = np.where(operations == Operation.TRANSLATE_Y, -magnitudes, shear_y * half)
    return maps.astype(np.float32) / np.float32(half)
