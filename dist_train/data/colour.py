"""The colour change on the CPU: jitter, normalisation, flip and HWC -> CHW in one pass over the pixels.

Separate passes for these cost more than decoding a small image; one compiled pass is bound by memory, not arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


# The GIL is released, so that threads share a batch. The compiled code is cached on disk, as every process needs it,
# and loaded with this module, as the types are named: that takes a second, most of it Numba's own.
# Indexes are unsigned and rows flat because only then LLVM turns the loops into vector instructions: 4 times as fast.
@njit(
    "void(uint8[:,:,:,::1], float32[:,:,::1], boolean[::1], float32[::1], float32[::1], float32[:,:,:,::1])",
    nogil=True,
    cache=True,
    fastmath={"contract", "nsz", "arcp", "nnan", "ninf", "reassoc"},
    error_model="numpy",
)
def change_colours(
    pixels: NDArray[np.uint8],
    maps: NDArray[np.float32],
    flip: NDArray[np.bool_],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    out: NDArray[np.float32],
) -> Any:
    """out[i, c, y, x] = scale[c] * clip(maps[i] applied to pixels[i, y, x], 0, 255) + shift[c].

    pixels: (B, H, W, 3) uint8, contiguous. maps: (B, 3, 4), an affine map of RGB in 0..255, constant last. flip: (B,),
    take x from the right. scale, shift: (3,). out: (B, 3, H, W) float32, contiguous.
    """
    batch, height, width, _ = pixels.shape
    columns, last, one, three = np.uint64(width), np.uint64(width - 1), np.uint64(1), np.uint64(3)
    low, high = np.float32(0), np.float32(255)
    straight = np.empty((3, width), np.float32)
    turned = np.empty((3, width), np.float32)
    for i in range(batch):
        for y in range(height):
            row = pixels[i, y].reshape(-1)
            red, green, blue = straight[0], straight[1], straight[2]
            for x in range(columns):
                red[x] = row[three * x]
                green[x] = row[three * x + one]
                blue[x] = row[three * x + one + one]
            if flip[i]:
                for c in range(3):
                    source, target = straight[c], turned[c]
                    for x in range(columns):
                        target[x] = source[last - x]
                red, green, blue = turned[0], turned[1], turned[2]
            for c in range(3):
                of_red, of_green, of_blue, constant = maps[i, c, 0], maps[i, c, 1], maps[i, c, 2], maps[i, c, 3]
                factor, offset = scale[c], shift[c]
                line = out[i, c, y]
                for x in range(columns):
                    value = of_red * red[x] + of_green * green[x] + of_blue * blue[x] + constant
                    line[x] = factor * min(max(value, low), high) + offset
