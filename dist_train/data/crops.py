"""Where an image is cropped and erased: torchvision's RandomResizedCrop, RandomErasing, and Resize with CenterCrop.

All by whole batches, from numbers that `augment.py` draws; nothing here is random. What depends on the size of an image
takes it as (B, 2), (height, width) in pixels, upright, as its header has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TRIES = 10  # of torchvision's, for a box that fits
NUMBERS = 2 * _TRIES + 2
"""Random numbers that a box takes."""
ERASED_SCALE, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""torchvision's defaults of RandomErasing: share of the area, height by width."""


@dataclass(frozen=True)
class Regions:
    """What to decode of B images and what of it to resize to a square; (B, 2) each, (y, x) in pixels.

    begin, extent: the part that is decoded, int32. origin, full: where that part begins in what is resized, and the
    size of what is resized, int32; nothing outside of it is read. start, length: of the region, float64.
    """

    begin: NDArray[np.int32]
    extent: NDArray[np.int32]
    origin: NDArray[np.int32]
    full: NDArray[np.int32]
    start: NDArray[np.float64]
    length: NDArray[np.float64]


def regions_of_boxes(boxes: NDArray[np.int32]) -> Regions:
    """Of (B, 4) y, x, height, width: each is cut out and then resized, so the pixels around it do not count."""
    begin, extent = np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])
    nothing = np.zeros_like(begin)
    return Regions(begin, extent, nothing, extent, nothing.astype(np.float64), extent.astype(np.float64))


def regions_of_centres(sizes: NDArray[np.int32], image_size: int, share: float) -> Regions:
    """The middle square of `image_size` of the image resized so that its shorter side is `image_size` / `share`.

    As in timm: the shorter side is rounded down, as torchvision's Resize does with the longer one.
    """
    shorter = math.floor(image_size / share)
    resized = shorter * sizes.astype(np.int64) // sizes.min(axis=1, keepdims=True)
    scale = sizes / resized  # pixels of the image for one of the result
    start = np.rint((resized - image_size) / 2) * scale
    length = image_size * scale
    reach = np.floor(scale).astype(np.int32) + 2  # the resize reads at most a pixel and a half beyond the region
    begin = np.maximum(np.floor(start).astype(np.int32) - reach, 0)
    end = np.minimum(np.ceil(start + length).astype(np.int32) + reach, sizes)
    full = np.ascontiguousarray(sizes, np.int32)
    return Regions(begin, np.ascontiguousarray(end - begin), begin, full, start, length)


def resized_crops(
    drawn: NDArray[np.float64], sizes: NDArray[np.int32], scale: tuple[float, float], ratio: tuple[float, float]
) -> NDArray[np.int32]:
    """Boxes of RandomResizedCrop, (B, 4) y, x, height, width in pixels of the image.

    drawn: (NUMBERS, B) in [0, 1). Area and aspect (width by height) are tried ten times; where none fits, the box is
    the largest in the middle whose aspect is allowed.
    """
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    tried_width, tried_height = _tries(drawn, height * width, scale, ratio)
    fits = (0 < tried_width) & (tried_width <= width) & (0 < tried_height) & (tried_height <= height)
    chosen, found = _first(fits)
    box_height, box_width = tried_height[chosen], tried_width[chosen]
    y = np.floor(drawn[-2] * (height - box_height + 1))
    x = np.floor(drawn[-1] * (width - box_width + 1))
    if not found.all():
        low, high = min(ratio), max(ratio)
        fallback_height = np.where(width / height < low, np.maximum(np.rint(width / low), 1), height)
        fallback_width = np.where(width / height > high, np.maximum(np.rint(height * high), 1), width)
        box_height, box_width = np.where(found, box_height, fallback_height), np.where(found, box_width, fallback_width)
        y, x = np.where(found, y, (height - box_height) // 2), np.where(found, x, (width - box_width) // 2)
    return np.stack([y, x, box_height, box_width], 1).astype(np.int32)


def erased_boxes(drawn: NDArray[np.float64], side: int) -> NDArray[np.int32]:
    """Boxes of RandomErasing in squares of `side`, (B, 4) y, x, height, width; drawn: (NUMBERS, B) in [0, 1).

    Where none of ten tries fits, nothing is erased: the box is empty.
    """
    height, width = _tries(drawn, np.float64(side * side), ERASED_SCALE, ERASED_RATIO)
    chosen, found = _first((height < side) & (width < side))
    box_height, box_width = np.where(found, height[chosen], 0), np.where(found, width[chosen], 0)
    y, x = np.floor(drawn[-2] * (side - box_height + 1)), np.floor(drawn[-1] * (side - box_width + 1))
    return np.stack([y, x, box_height, box_width], 1).astype(np.int32)


def _tries(
    drawn: NDArray[np.float64],
    area: NDArray[np.float64] | np.float64,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Whole sides of the ten tries, (10, B) each, the first by the second in `ratio`, uniform in its logarithm."""
    target = area * (scale[0] + (scale[1] - scale[0]) * drawn[:_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * drawn[_TRIES : 2 * _TRIES])
    return np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))


def _first(fits: NDArray[np.bool_]) -> tuple[tuple[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]:
    """Index of the first try that fits, for arrays of (10, B), and whether there is one, (B,)."""
    return (fits.argmax(axis=0), np.arange(fits.shape[1])), np.asarray(fits.any(axis=0))
