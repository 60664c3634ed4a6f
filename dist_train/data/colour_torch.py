"""The colour change by PyTorch's operators, on any device; and which form of it a GPU gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dist_train.data.augment import GREY

log = logging.getLogger(__name__)

Channels = tuple[float, float, float]
ColourChange = Callable[[Tensor, Tensor, Channels, Channels], Tensor]


def change_colours(pixels: Tensor, parameters: Tensor, scale: Channels, shift: Channels) -> Tensor:
    """scale[c] * (plane c of each image after jitter and flip, 0 to 255) + shift[c]: (B, 3, H, W) float32.

    pixels: (B, H, W, 3) uint8. parameters: (B, 5) float32 of `colour_parameters`, on the same device.
    """
    brightness, contrast, saturation, turn, flip = parameters.reshape(-1, 5, 1, 1, 1).unbind(1)
    image = (brightness * pixels.permute(0, 3, 1, 2)).clamp(max=255)
    image = (contrast * image + (1 - contrast) * _grey(image).mean((2, 3), keepdim=True)).clamp(0, 255)
    image = (saturation * image + (1 - saturation) * _grey(image)).clamp(0, 255)
    image = torch.where(turn == 0, image, _turned(image, 6 * turn[:, 0]))
    image = torch.where(flip == 0, image, image.flip(3))
    return image * image.new_tensor(scale).reshape(3, 1, 1) + image.new_tensor(shift).reshape(3, 1, 1)


def _grey(image: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, 3, H, W)."""
    red, green, blue = image.split(1, 1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _turned(image: Tensor, turn: Tensor) -> Tensor:
    """The hue turned by (B, 1, 1) sixths of the circle; `colour.py` says how."""
    red, green, blue = image.unbind(1)
    lowest, highest = image.aminmax(dim=1)
    chroma = highest - lowest
    hue = green - blue + turn * chroma
    hue = torch.where(green == highest, blue - red + (turn + 2) * chroma, hue)
    hue = torch.where(blue == highest, red - green + (turn - 2) * chroma, hue)
    hue = torch.where(hue > 3 * chroma, hue - 6 * chroma, hue)
    red = highest + chroma - hue.abs()
    green, blue = (lowest - chroma + (hue + away).abs() for away in (chroma, -chroma))
    return torch.stack([red, green, blue], 1).minimum(highest[:, None]).maximum(lowest[:, None])


@cache
def fastest_colour_change(device: torch.device, side: int) -> ColourChange:
    """The Triton kernel for images of this side, or `change_colours` where it cannot be compiled: without Triton, a C
    compiler or a folder to write to. Compiles it, for about a second once a machine."""
    try:
        from dist_train.data import colour_triton

        nothing = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device)
        colour_triton.change_colours(nothing, torch.ones(1, 5, device=device), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
        return colour_triton.change_colours
    except Exception as error:  # of many kinds; if it is the GPU itself, what comes next fails too
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        log.warning(
            "colours are changed by PyTorch's operators, not by one kernel: Triton does not work here (%s: %s)",
            type(error).__name__,
            said,
        )
        return change_colours
