"""The colour change on the CPU: jitter, normalisation, flip and HWC -> CHW in one pass over the pixels.

Separate passes for these cost more than decoding a small image; one compiled pass is bound by memory, not arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


# The GIL is released, so that threads share a batch; the compiled code is cached on disk, as every process needs it.
@njit(nogil=True, cache=True, fastmath={"contract", "nsz", "arcp"}, error_model="numpy")
def change_colours(
    pixels: NDArray[np.uint8],
    maps: NDArray[np.float32],
    flip: NDArray[np.bool_],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
    out: NDArray[np.float32],
) -> Any:
    """out[i, c, y, x] = scale[c] * clip(maps[i] applied to pixels[i, y, x], 0, 255) + shift[c].

    pixels: (B, H, W, 3) uint8. maps: (B, 3, 4), an affine map of RGB in 0..255, constant last. flip: (B,), take x from
    the right. scale, shift: (3,). out: (B, 3, H, W) float32.
    """
    batch, height, width, _ = pixels.shape
    low, high = np.float32(0), np.float32(255)
    for i in range(batch):
        m = maps[i]
        rr, rg, rb, r0 = m[0, 0], m[0, 1], m[0, 2], m[0, 3]
        gr, gg, gb, g0 = m[1, 0], m[1, 1], m[1, 2], m[1, 3]
        br, bg, bb, b0 = m[2, 0], m[2, 1], m[2, 2], m[2, 3]
        for y in range(height):
            row = pixels[i, y]
            red, green, blue = out[i, 0, y], out[i, 1, y], out[i, 2, y]
            for x in range(width):
                r, g, b = np.float32(row[x, 0]), np.float32(row[x, 1]), np.float32(row[x, 2])
                red[x] = scale[0] * min(max(rr * r + rg * g + rb * b + r0, low), high) + shift[0]
                green[x] = scale[1] * min(max(gr * r + gg * g + gb * b + g0, low), high) + shift[1]
                blue[x] = scale[2] * min(max(br * r + bg * g + bb * b + b0, low), high) + shift[2]
            if flip[i]:  # reversing a row in the cache is cheaper than reading it backwards
                for x in range(width // 2):
                    z = width - 1 - x
                    red[x], red[z] = red[z], red[x]
                    green[x], green[z] = green[z], green[x]
                    blue[x], blue[z] = blue[z], blue[x]
