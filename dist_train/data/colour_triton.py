"""The colour change on the GPU as one Triton kernel: a program per image, so that its mean grey needs no second kernel.

`TRITON_INTERPRET=1`, set before this module is imported, runs it on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_train.data.augment import GREY

_BLOCK = 1024  # pixels at once
_WARPS = 8


def change_colours(
    pixels: Tensor, parameters: Tensor, scale: tuple[float, float, float], shift: tuple[float, float, float]
) -> Tensor:
    """As `colour_torch.change_colours`, in the order of the current stream."""
    batch, height, width, _ = pixels.shape
    out = torch.empty(batch, 3, height, width, dtype=torch.float32, device=pixels.device)
    pixels, parameters = pixels.contiguous(), parameters.contiguous()
    # Triton launches on the thread's current device, whatever the tensors are on.
    with torch.cuda.device(pixels.device) if pixels.is_cuda else nullcontext():
        _change_colours[(batch,)](
            *(pixels, parameters, out, *scale, *shift, *GREY),
            WIDTH=width,
            PIXELS=height * width,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return out


@triton.jit
def _change_colours(
    pixels,
    parameters,
    out,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    GREY_RED: tl.constexpr,
    GREY_GREEN: tl.constexpr,
    GREY_BLUE: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)  # of large batches the offsets need more than 32 bits
    pixels += image * 3 * PIXELS
    out += image * 3 * PIXELS
    parameters += image * 5
    brightness, contrast, saturation = tl.load(parameters), tl.load(parameters + 1), tl.load(parameters + 2)
    turn, flip = 6 * tl.load(parameters + 3), tl.load(parameters + 4)

    rest = 0.0
    if contrast != 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, PIXELS, BLOCK):
            place = start + tl.arange(0, BLOCK)
            red, green, blue = _brightened(pixels, place, place < PIXELS, brightness)
            total += GREY_RED * red + GREY_GREEN * green + GREY_BLUE * blue
        rest = (1 - contrast) * (tl.sum(total, axis=0) / PIXELS)

    for start in range(0, PIXELS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < PIXELS
        x = place % WIDTH
        source = tl.where(flip != 0, place - x + (WIDTH - 1 - x), place)
        red, green, blue = _brightened(pixels, source, inside, brightness)
        red, green, blue = _clipped(contrast * red + rest, contrast * green + rest, contrast * blue + rest)
        grey = (1 - saturation) * (GREY_RED * red + GREY_GREEN * green + GREY_BLUE * blue)
        red, green, blue = _clipped(saturation * red + grey, saturation * green + grey, saturation * blue + grey)
        if turn != 0:
            red, green, blue = _turned(red, green, blue, turn)
        tl.store(out + place, scale_red * red + shift_red, inside)
        tl.store(out + PIXELS + place, scale_green * green + shift_green, inside)
        tl.store(out + 2 * PIXELS + place, scale_blue * blue + shift_blue, inside)


@triton.jit
def _brightened(pixels, place, inside, brightness):
    red = brightness * tl.load(pixels + 3 * place, inside, 0).to(tl.float32)
    green = brightness * tl.load(pixels + 3 * place + 1, inside, 0).to(tl.float32)
    blue = brightness * tl.load(pixels + 3 * place + 2, inside, 0).to(tl.float32)
    return _clipped(red, green, blue)


@triton.jit
def _clipped(red, green, blue):
    return (
        tl.minimum(tl.maximum(red, 0.0), 255.0),
        tl.minimum(tl.maximum(green, 0.0), 255.0),
        tl.minimum(tl.maximum(blue, 0.0), 255.0),
    )


@triton.jit
def _turned(red, green, blue, turn):
    """As in `colour.py`; turn in sixths of the circle."""
    highest = tl.maximum(tl.maximum(red, green), blue)
    lowest = tl.minimum(tl.minimum(red, green), blue)
    chroma = highest - lowest
    hue = green - blue + turn * chroma
    hue = tl.where(green == highest, blue - red + (turn + 2) * chroma, hue)
    hue = tl.where(blue == highest, red - green + (turn - 2) * chroma, hue)
    hue = tl.where(hue > 3 * chroma, hue - 6 * chroma, hue)
    red = tl.maximum(tl.minimum(highest + chroma - tl.abs(hue), highest), lowest)
    green = tl.maximum(tl.minimum(lowest - chroma + tl.abs(hue + chroma), highest), lowest)
    blue = tl.maximum(tl.minimum(lowest - chroma + tl.abs(hue - chroma), highest), lowest)
    return red, green, blue
