"""The resize of the CPU pipeline: a region of an image to a square, antialiased, compiled.

Linear interpolation as Pillow and torchvision define it: output pixel i is the average of the source pixels around its
centre, weighted by a triangle whose half-width is the larger of one output and one source pixel; source pixels outside
the image are left out. DALI's resize computes nearly the same (it repeats the border) in several times the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

# As in colour.py: the GIL is released, the compiled code cached and loaded with this module, indexes unsigned so that
# loops become vector code.
_COMPILE = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc"}, "error_model": "numpy"}


@njit(**_COMPILE)
def _triangle(full: int, start: float, length: float, origin: int, held: int, side: int) -> Any:
    """Source pixels and weights of each output pixel along one axis.

    Returns (first, taps, weights): (side,) index of the first source pixel among the `held` ones from `origin` on,
    (side,) number of them, (side, most taps) float32 that sum to 1.
    """
    step = length / side
    support = max(step, 1.0)
    first, taps = np.empty(side, np.int64), np.empty(side, np.int64)
    weights = np.zeros((side, int(2 * support) + 2), np.float32)
    for i in range(side):
        centre = start + (i + 0.5) * step
        begin = max(int(np.ceil(centre - support - 0.5)), 0, origin)  # the sources with |j + 0.5 - centre| <= support
        begin = min(begin, origin + held - 1)  # nothing outside of the array is read, whatever the sizes say
        end = max(min(int(np.floor(centre + support - 0.5)) + 1, full, origin + held), begin + 1)
        total = 0.0
        for j in range(begin, end):
            weights[i, j - begin] = 1 - abs(j + 0.5 - centre) / support
            total += weights[i, j - begin]
        weights[i] /= total
        first[i], taps[i] = begin - origin, end - begin
    return first, taps, weights


@njit("void(uint8[:,:,::1], int32[::1], int32[::1], float64[::1], float64[::1], uint8[:,:,::1])", **_COMPILE)
def resize_region(
    pixels: NDArray[np.uint8],
    origin: NDArray[np.int32],
    full: NDArray[np.int32],
    start: NDArray[np.float64],
    length: NDArray[np.float64],
    out: NDArray[np.uint8],
) -> Any:
    """Resize the region [start, start + length) of an image into `out` (S, S, 3), uint8, rounded.

    pixels: (H, W, 3) uint8, contiguous: the part of the image that begins at `origin`; what lies outside of it is taken
    to be outside of the image, so it must reach one output pixel and two source pixels beyond the region. full: size of
    the whole image. origin, full, start, length: (y, x), in pixels of the image.
    """
    height, width, _ = pixels.shape
    side = len(out)
    first_row, row_taps, row_weights = _triangle(full[0], start[0], length[0], origin[0], height, side)
    first_column, column_taps, column_weights = _triangle(full[1], start[1], length[1], origin[1], width, side)
    rows, target = pixels.reshape(height, 3 * width), out.reshape(side, 3 * side)
    columns, one, three = np.uint64(3 * width), np.uint64(1), np.uint64(3)
    mixed = np.empty(3 * width, np.float32)  # one output row at the source's width
    for y in range(side):
        source, weight = rows[first_row[y]], row_weights[y, 0]
        for x in range(columns):
            mixed[x] = weight * source[x]
        for tap in range(1, row_taps[y]):
            source, weight = rows[first_row[y] + tap], row_weights[y, tap]
            for x in range(columns):
                mixed[x] += weight * source[x]
        line = target[y]
        for x in range(np.uint64(side)):
            red = green = blue = np.float32(0.5)  # so that the conversion to integers rounds
            at = three * np.uint64(first_column[x])
            for tap in range(column_taps[x]):
                weight = column_weights[x, tap]
                red += weight * mixed[at]
                green += weight * mixed[at + one]
                blue += weight * mixed[at + one + one]
                at += three
            line[three * x] = np.uint8(red)
            line[three * x + one] = np.uint8(green)
            line[three * x + one + one] = np.uint8(blue)
