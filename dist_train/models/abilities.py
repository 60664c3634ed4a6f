"""What a backbone can do, and with what images. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass

from dist_train.errors import UseError


@dataclass(frozen=True)
class Abilities:
    """What a backbone can do, by which a recipe is checked."""

    tokens: bool
    """It is a sequence of blocks that hand on tokens."""
    per_block: bool
    """It gives every block's [CLS]."""
    text: bool
    """Its blocks take text tokens and a mask."""
    batch_norms: bool
    """It has some."""
    recomputes: bool
    """It can compute its blocks again in the backward pass."""
    layers: int
    """Layers behind the stem, as model.freeze counts them."""


def check_patches(backbone: str, side: int, image_size: int, more: str = "") -> None:
    """Raise UseError where patches would leave a margin of the image out, silently. more: what else would do."""
    if image_size % side:
        below = image_size // side * side
        sizes = " or ".join(str(size) for size in (below, below + side) if size > 0)
        raise UseError(
            f"model.backbone: {backbone} has patches of {side} pixels, which do not divide data.image_size "
            f"{image_size}; an image size of {sizes} would do{more}"
        )
