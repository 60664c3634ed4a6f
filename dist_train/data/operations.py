"""The operations of RandAugment on the CPU, and what follows the colour change: blur and erasing; compiled.

Operations work on whole numbers and round as torchvision's kernels for uint8 do. Here no arithmetic may be contracted
or reordered: `operations_torch.py` computes the same, step by step, and both must find the same pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dist_train.data.augment import GREY
from dist_train.data.auto_augment import Operation

_EXACT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_OF_RED, _OF_GREEN, _OF_BLUE = (np.float32(weight) for weight in GREY)
# Numba takes no members of an IntEnum from another module as constants to compare with.
_SHEAR_X, _ROTATE = int(Operation.SHEAR_X), int(Operation.ROTATE)
_BRIGHTNESS, _COLOR, _CONTRAST = int(Operation.BRIGHTNESS), int(Operation.COLOR), int(Operation.CONTRAST)
_SHARPNESS, _POSTERIZE, _SOLARIZE = int(Operation.SHARPNESS), int(Operation.POSTERIZE), int(Operation.SOLARIZE)
_AUTOCONTRAST, _EQUALIZE = int(Operation.AUTOCONTRAST), int(Operation.EQUALIZE)


@njit(**_EXACT)
def _flip(image: NDArray[np.uint8]) -> None:
    side = image.shape[1]
    for y in range(len(image)):
        for x in range(side // 2):
            for c in range(3):
                other = image[y, side - 1 - x, c]
                image[y, side - 1 - x, c] = image[y, x, c]
                image[y, x, c] = other


@njit(**_EXACT)
def _copy(image: NDArray[np.uint8], to: NDArray[np.uint8]) -> None:
    old, new = image.reshape(-1), to.reshape(-1)
    for i in range(np.uint64(len(old))):
        new[i] = old[i]


@njit(**_EXACT)
def _place(along_x: np.float32, by_y: np.float32, y: np.float32, shift: np.float32, side: np.float32) -> int:
    """Which pixel of a row or column is nearest, in float32 with the product by y fused, as torch computes it."""
    out = np.float32(np.float64(y) * np.float64(by_y) + np.float64(along_x)) + shift
    return int(np.rint(((out + np.float32(1)) * side - np.float32(1)) / np.float32(2)))


@njit(**_EXACT)
def _move(image: NDArray[np.uint8], rows: NDArray[np.float32], source: NDArray[np.uint8]) -> None:
    """Put in place of each pixel the nearest to where `rows` of an affine map lead; source: memory for a copy."""
    side = len(image)
    _copy(image, source)
    old, new = source.reshape(-1), image.reshape(-1)
    wide, middle, one, two = np.float32(side), np.float32((side - 1) / 2), np.uint64(1), np.uint64(2)
    at = np.uint64(0)
    for y in range(side):
        from_centre = np.float32(y) - middle
        for x in range(side):
            across = np.float32(x) - middle
            column = _place(across * rows[0], rows[1], from_centre, rows[2], wide)
            row = _place(across * rows[3], rows[4], from_centre, rows[5], wide)
            if 0 <= column < side and 0 <= row < side:
                found = np.uint64(3 * (row * side + column))
                new[at], new[at + one], new[at + two] = old[found], old[found + one], old[found + two]
            else:
                new[at] = new[at + one] = new[at + two] = 0
            at += np.uint64(3)


@njit(**_EXACT)
def _cut(value: np.float32) -> np.uint8:
    """To a whole number, as torchvision does: without rounding."""
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@njit(**_EXACT)
def _grey(red: np.uint8, green: np.uint8, blue: np.uint8) -> np.float32:
    grey = np.float32(red) * _OF_RED + np.float32(green) * _OF_GREEN + np.float32(blue) * _OF_BLUE
    return np.floor(grey)


@njit(**_EXACT)
def _colour(image: NDArray[np.uint8], factor: np.float32, rest: np.float32) -> None:
    pixels = image.reshape(-1, 3)
    for p in range(len(pixels)):
        grey = _grey(pixels[p, 0], pixels[p, 1], pixels[p, 2]) * rest
        for c in range(3):
            pixels[p, c] = _cut(np.float32(pixels[p, c]) * factor + grey)


@njit(**_EXACT)
def _sharpen(image: NDArray[np.uint8], rest: np.float32, source: NDArray[np.uint8]) -> None:
    """Blend with the mean of the neighbours, in which a pixel counts five times; the border stays."""
    side = len(image)
    _copy(image, source)
    rows, out = source.reshape(side, 3 * side), image.reshape(side, 3 * side)
    three, five, half = np.uint64(3), np.float32(5), np.float32(0.5)
    for y in range(1, side - 1):
        above, here, below, line = rows[y - 1], rows[y], rows[y + 1], out[y]
        for i in range(three, np.uint64(3 * side - 3)):
            own = np.float32(here[i])
            total = np.float32(above[i - three]) + np.float32(above[i]) + np.float32(above[i + three])
            total += np.float32(here[i - three]) + five * own + np.float32(here[i + three])
            total += np.float32(below[i - three]) + np.float32(below[i]) + np.float32(below[i + three])
            smooth = np.floor(total * np.float32(1 / 13) + half)  # whole numbers over 13: never near a half
            line[i] = _cut(own + (smooth - own) * rest)


@njit(**_EXACT)
def _equalized(counts: NDArray[np.int64], pixels: int, table: NDArray[np.uint8]) -> None:
    last = 255
    while counts[last] == 0:
        last -= 1
    step = (pixels - counts[last]) // 255
    below = 0
    for value in range(256):
        table[value] = min((below + step // 2) // step, 255) if step and value else 0 if step else value
        below += counts[value]


@njit(**_EXACT)
def _stretched(counts: NDArray[np.int64], table: NDArray[np.uint8]) -> None:
    low, high = 0, 255
    while counts[low] == 0:
        low += 1
    while counts[high] == 0:
        high -= 1
    span = np.float32(high - low) * np.float32(1 / 255)
    for value in range(256):
        table[value] = _cut(np.float32(value - low) / span) if span else value


@njit(**_EXACT)
def _fill_table(image: NDArray[np.uint8], kind: int, magnitude: float, table: NDArray[np.uint8]) -> None:
    """What becomes of each value, for operations that look at nothing else of a channel."""
    factor, rest, mean = np.float32(1 + magnitude), np.float32(1 - (1 + magnitude)), np.float32(0)
    if kind == _CONTRAST:
        total, pixels = 0, image.reshape(-1, 3)
        for p in range(len(pixels)):
            total += int(_grey(pixels[p, 0], pixels[p, 1], pixels[p, 2]))
        mean = np.float32(total / len(pixels)) * rest
    mask = 256 - (1 << (8 - int(magnitude)))
    threshold = np.float32(255 * magnitude)
    for value in range(256):
        if kind == _POSTERIZE:
            table[value] = value & mask
        elif kind == _SOLARIZE:
            table[value] = 255 - value if np.float32(value) >= threshold else value
        else:
            table[value] = _cut(np.float32(value) * factor + mean)


@njit(**_EXACT)
def _by_tables(
    image: NDArray[np.uint8], kind: int, magnitude: float, tables: NDArray[np.uint8], counts: NDArray[np.int64]
) -> None:
    """tables: memory for (3, 256) bytes; counts: for as many numbers."""
    pixels = image.reshape(-1, 3)
    if kind == _AUTOCONTRAST or kind == _EQUALIZE:
        for c in range(3):
            for value in range(256):
                counts[c, value] = 0
        for p in range(len(pixels)):
            for c in range(3):
                counts[c, pixels[p, c]] += 1
        for c in range(3):
            if kind == _EQUALIZE:
                _equalized(counts[c], len(pixels), tables[c])
            else:
                _stretched(counts[c], tables[c])
        for p in range(len(pixels)):
            for c in range(3):
                pixels[p, c] = tables[c, pixels[p, c]]
    else:
        _fill_table(image, kind, magnitude, tables[0])
        for p in range(len(pixels)):
            for c in range(3):
                pixels[p, c] = tables[0, pixels[p, c]]


@njit(
    "void(uint8[:,:,:,::1], boolean[::1], int64[:,::1], float64[:,::1], float32[:,:,::1])",
    **_EXACT,
)
def apply_operations(
    pixels: NDArray[np.uint8],
    flip: NDArray[np.bool_],
    operations: NDArray[np.int64],
    magnitudes: NDArray[np.float64],
    maps: NDArray[np.float32],
) -> Any:
    """Flip, and do the operations of each image one after the other, in place.

    pixels: (B, S, S, 3) uint8, contiguous. flip: (B,). operations, magnitudes: (B, n); maps: (B, n, 6) of
    `affine_maps`.
    """
    spare = np.empty(pixels.shape[1:], np.uint8)
    tables, counts = np.empty((3, 256), np.uint8), np.empty((3, 256), np.int64)
    for i in range(len(pixels)):
        image = pixels[i]
        if flip[i]:
            _flip(image)
        for k in range(operations.shape[1]):
            kind, magnitude = operations[i, k], magnitudes[i, k]
            factor = 1 + magnitude
            if _SHEAR_X <= kind <= _ROTATE:
                if magnitude:
                    _move(image, maps[i, k], spare)
            elif kind == _COLOR:
                _colour(image, np.float32(factor), np.float32(1 - factor))
            elif kind == _SHARPNESS:
                _sharpen(image, np.float32(1 - factor), spare)
            elif kind >= _BRIGHTNESS:
                _by_tables(image, kind, magnitude, tables, counts)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz"})
def _blur(plane: NDArray[np.float32], weights: NDArray[np.float32], spare: NDArray[np.float32]) -> None:
    """Columns, then rows, with the border reflected; spare: memory of a plane."""
    side, reach = len(plane), len(weights) // 2
    last, columns = side - 1, np.uint64(side)
    padded = np.empty(side + 2 * reach, np.float32)
    for y in range(side):
        line = spare[y]
        for x in range(columns):
            line[x] = 0
        for k in range(len(weights)):
            source, weight = plane[last - abs(last - abs(y + k - reach))], weights[k]
            for x in range(columns):
                line[x] += weight * source[x]
    for y in range(side):
        for x in range(side + 2 * reach):
            padded[x] = spare[y, last - abs(last - abs(x - reach))]
        line = plane[y]
        for x in range(columns):
            line[x] = 0
        for k in range(len(weights)):
            weight, source = weights[k], padded[k:]
            for x in range(columns):
                line[x] += weight * source[x]


@njit("void(float32[:,:,:,::1], boolean[::1], float32[:,::1], int32[:,::1])", **_EXACT)
def blur_and_erase(
    images: NDArray[np.float32], blurred: NDArray[np.bool_], kernels: NDArray[np.float32], erased: NDArray[np.int32]
) -> Any:
    """Blur those that are to be, and put 0 into the box of each, in place.

    images: (B, 3, S, S) float32, contiguous, normalised. blurred: (B,). kernels: (B, odd), less than 2 S long. erased:
    (B, 4) y, x, height, width.
    """
    spare = np.empty(images.shape[2:], np.float32)
    for i in range(len(images)):
        if blurred[i]:
            for c in range(3):
                _blur(images[i, c], kernels[i], spare)
        for c in range(3):
            for y in range(erased[i, 0], erased[i, 0] + erased[i, 2]):
                for x in range(erased[i, 1], erased[i, 1] + erased[i, 3]):
                    images[i, c, y, x] = 0
