"""Backbones by name: which there are, and what their names say. Imports nothing slow: a wrong name is told at once.

A name says what timm calls the architecture without the training resolution: `vit_base_patch16` is timm's
`vit_base_patch16_224` at whatever image size the recipe has. The patch size is free, so that small images can be
cut into small patches (`vit_tiny_patch8`).
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.ranges import check_section

CNNS = ("resnet18", "resnet50", "efficientnet_b0")
"""Backbones without a [CLS] token: they take neither text nor the IFA head."""


@dataclass(frozen=True)
class ViTShape:
    """Size of a vision transformer."""

    size: str
    """tiny, small, base or large."""
    patch: int
    """Side of a patch, pixels."""
    dim: int
    """Channels of a token."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads of a block."""


FILE_TYPES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
"""Of weights that model.weights may name."""
NEEDS_VIT = "optim.layer_decay and a number for model.freeze need a ViT; with a CNN use 1, and none or backbone"
VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Channels, blocks and attention heads, as in timm."""


def vit_shape(backbone: str) -> ViTShape | None:
    """Shape of the vision transformer `backbone`, or None for a CNN. Raises UseError for an unknown name."""
    if backbone in CNNS:
        return None
    match = re.fullmatch(rf"vit_({'|'.join(VIT_SIZES)})_patch([1-9][0-9]*)", backbone)
    if match is None:
        known = [*CNNS, *(f"vit_{size}_patch{patch}" for size in VIT_SIZES for patch in (4, 8, 16, 32))]
        # As others write it: google/vit-base-patch16-224, vit_base_patch16_224.augreg_in21k.
        plain = backbone.lower().rpartition("/")[2].partition(".")[0].replace("-", "_")
        nearest = difflib.get_close_matches(re.sub(r"_\d{3}(_in21k|_in1k)?$", "", plain), known, n=1, cutoff=0.75)
        advice = f"did you mean {nearest[0]}? There are" if nearest else "there are"
        raise UseError(
            f"model.backbone: {backbone!r} is unknown; {advice} {', '.join(CNNS)}, "
            f"vit_{{{','.join(VIT_SIZES)}}}_patch{{N}}"
        )
    size, patch = match[1], int(match[2])
    return ViTShape(size, patch, *VIT_SIZES[size])


def check_image_size(backbone: str, image_size: int) -> None:
    """Raise UseError if the patches of `backbone` do not fill an image of `image_size` pixels a side exactly."""
    shape = vit_shape(backbone)
    if shape is None or image_size % shape.patch == 0:
        return
    below = image_size // shape.patch * shape.patch
    sizes = " or ".join(str(size) for size in (below, below + shape.patch) if size > 0)
    patches = ", ".join(str(patch) for patch in range(2, image_size + 1) if image_size % patch == 0)
    raise UseError(
        f"model.backbone: {backbone} has patches of {shape.patch} pixels, which do not divide data.image_size "
        f"{image_size}; an image size of {sizes} would do, or one of the patch sizes {patches}"
    )


def check_weights(source: str) -> None:
    """Raise UseError where model.weights names no file or folder that is there."""
    if source in ("none", "hub") or source.startswith("hub:"):
        return
    # `:ema` and the like may follow a folder.
    if not any(os.path.exists(path) for path in (source, source.rpartition(":")[0] or source)):
        if Path(source).suffix in FILE_TYPES:
            raise UseError(f"model.weights: there is no file {source}")
        raise UseError(f"model.weights: {source!r} is not none, hub, hub:TAG or a file of type {', '.join(FILE_TYPES)}")


def check_model(config: ModelConfig, image_size: int) -> None:
    """Raise UseError for a model section that no model can be built of, for images of `image_size` pixels a side."""
    check_section("model", config)
    shape = vit_shape(config.backbone)
    check_image_size(config.backbone, image_size)
    if shape is None and config.head != "cls":
        raise UseError(
            f"model.head: {config.head} needs the [CLS] tokens of a ViT, {config.backbone} has none; use cls"
        )
    if shape is None and config.text_tokens > 0:
        raise UseError(f"model.text_tokens: text needs a ViT, not {config.backbone}; use 0, or a vit_ backbone")
    if shape is None and config.checkpoint_blocks:
        raise UseError(
            f"model.checkpoint_blocks: {config.backbone} would count each batch twice in its running statistics; "
            "use false, or a vit_ backbone"
        )
    if config.freeze in ("none", "backbone"):
        return
    if shape is None:
        raise UseError(NEEDS_VIT)
    if not config.freeze.isdecimal() or int(config.freeze) > shape.depth:
        raise UseError(
            f"model.freeze is {config.freeze!r}; use none, backbone or a number of blocks from 0 to {shape.depth}"
        )
