"""The colour change on the CPU: jitter, normalisation, flip and HWC -> CHW, compiled, one image after the other.

Separate passes over a batch for each of these cost more than decoding a small image. Here an image's planes of bytes
stay in the cache between the first pass, which takes it apart, the second, which adds up its grey, and the last, which
does all arithmetic in registers and writes the floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from dist_train.data.augment import GREY

# The GIL is released, so that threads share a batch. The compiled code is cached on disk, as every process needs it,
# and loaded with this module, as the types are named: that takes a second, most of it Numba's own.
# Indexes are unsigned and rows flat because only then LLVM turns the loops into vector instructions: 4 times as fast.
# So does a single float64 among the pixels' values, hence all the float32.
_COMPILE: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "fastmath": {"contract", "nsz", "arcp", "nnan", "ninf", "reassoc"},
    "error_model": "numpy",
}
_OF_RED, _OF_GREEN, _OF_BLUE = (np.float32(weight) for weight in GREY)


@njit(**_COMPILE)
def _take_apart(image: NDArray[np.uint8], flip: bool, planes: NDArray[np.uint8]) -> None:
    """planes[c, y, x] = image[y, x, c], with x from the right if `flip`."""
    height, width, _ = image.shape
    columns, last, one, three = np.uint64(width), np.uint64(width - 1), np.uint64(1), np.uint64(3)
    for y in range(height):
        row = image[y].reshape(-1)
        red, green, blue = planes[0, y], planes[1, y], planes[2, y]
        if flip:
            for x in range(columns):
                red[last - x] = row[three * x]
                green[last - x] = row[three * x + one]
                blue[last - x] = row[three * x + one + one]
        else:
            for x in range(columns):
                red[x] = row[three * x]
                green[x] = row[three * x + one]
                blue[x] = row[three * x + one + one]


@njit(**_COMPILE)
def _mean_grey(planes: NDArray[np.uint8], brightness: np.float32) -> np.float32:
    """The mean grey of an image after the change of its brightness."""
    _, height, width = planes.shape
    high, total = np.float32(255), np.float64(0)
    for y in range(height):
        red, green, blue = planes[0, y], planes[1, y], planes[2, y]
        grey = np.float32(0)
        for x in range(np.uint64(width)):
            grey += _OF_RED * min(brightness * red[x], high)
            grey += _OF_GREEN * min(brightness * green[x], high)
            grey += _OF_BLUE * min(brightness * blue[x], high)
        total += grey
    return np.float32(total / (height * width))


# Put in the place of each call, so that one with a constant that changes nothing becomes a loop without that change.
@njit(inline="always", **_COMPILE)
def _write(
    planes: NDArray[np.uint8],
    gain: np.float32,
    rest: np.float32,
    white: np.float32,
    saturation: np.float32,
    turn: np.float32,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """out[c] = scale[c] * (plane c, from gain * value + rest up to white on, after saturation and turn) + shift[c].

    turn: of the hue, in sixths of the circle, 0 to 6.
    """
    _, height, width = planes.shape
    zero, one, two, high = np.float32(0), np.float32(1), np.float32(2), np.float32(255)
    three, six = np.float32(3), np.float32(6)
    reds, greens, blues = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    to_red, to_green, to_blue = out[0].reshape(-1), out[1].reshape(-1), out[2].reshape(-1)
    own_grey, turn_of_green, turn_of_blue = one - saturation, turn + two, turn - two
    for p in range(np.uint64(height * width)):
        red = max(min(gain * reds[p] + rest, white), zero)
        green = max(min(gain * greens[p] + rest, white), zero)
        blue = max(min(gain * blues[p] + rest, white), zero)
        if saturation != one:
            grey = own_grey * (_OF_RED * red + _OF_GREEN * green + _OF_BLUE * blue)
            red = max(min(saturation * red + grey, high), zero)
            green = max(min(saturation * green + grey, high), zero)
            blue = max(min(saturation * blue + grey, high), zero)
        if turn != zero:
            # HSV and back without a division. Hue is in sixths of the circle, times the chroma: red 0, green 2, blue
            # -2. After the turn it lies from -3 to 3. Red is highest up to 1 away from its hue, lowest from 2 on,
            # linear in between. So are green and blue, seen from the hues opposite to theirs, -1 and 1.
            highest, lowest = max(max(red, green), blue), min(min(red, green), blue)
            chroma = highest - lowest
            hue = green - blue + turn * chroma
            hue = blue - red + turn_of_green * chroma if green == highest else hue
            hue = red - green + turn_of_blue * chroma if blue == highest else hue
            hue = hue - six * chroma if hue > three * chroma else hue
            red = max(min(highest + chroma - abs(hue), highest), lowest)
            green = max(min(lowest - chroma + abs(hue + chroma), highest), lowest)
            blue = max(min(lowest - chroma + abs(hue - chroma), highest), lowest)
        to_red[p] = scale[0] * red + shift[0]
        to_green[p] = scale[1] * green + shift[1]
        to_blue[p] = scale[2] * blue + shift[2]


@njit("void(uint8[:,:,:,::1], float32[:,::1], float32[::1], float32[::1], float32[:,:,:,::1])", **_COMPILE)
def change_colours(
    pixels: NDArray[np.uint8],
    parameters: NDArray[np.float32],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    out: NDArray[np.float32],
) -> Any:
    """out[i, c] = scale[c] * (plane c of image i after jitter and flip, 0 to 255) + shift[c].

    pixels: (B, H, W, 3) uint8, contiguous. parameters: (B, 5) of `colour_parameters`; what changes nothing in an image
    costs nothing. scale, shift: (3,). out: (B, 3, H, W) float32, contiguous.
    """
    batch, height, width, _ = pixels.shape
    planes = np.empty((3, height, width), np.uint8)
    zero, one, six, high = np.float32(0), np.float32(1), np.float32(6), np.float32(255)
    for i in range(batch):
        brightness, contrast, saturation = parameters[i, 0], parameters[i, 1], parameters[i, 2]
        turn = six * parameters[i, 3]
        _take_apart(pixels[i], parameters[i, 4] != 0, planes)
        rest = (one - contrast) * _mean_grey(planes, brightness) if contrast != 1 else zero
        # Contrast after brightness is one product, and white after both is where brightness would clip.
        gain, white = contrast * brightness, min(contrast * high + rest, high)
        if turn != 0:
            _write(planes, gain, rest, white, saturation, turn, scale, shift, out[i])
        elif saturation != 1:
            _write(planes, gain, rest, white, saturation, zero, scale, shift, out[i])
        else:
            _write(planes, gain, rest, white, one, zero, scale, shift, out[i])
