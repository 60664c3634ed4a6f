"""Backbones by name: which there are, and what their names say.

The paper's names say what timm calls the architecture without the training resolution: `vit_base_patch16` is timm's
`vit_base_patch16_224` at whatever image size the recipe has. The patch size is free, so that small images can be
cut into small patches (`vit_tiny_patch8`). What they can do is known here, so that a recipe with one of them is checked
without a slow import. Any other name is timm's, with a tag of its pretrained weights or without one
(`vit_base_patch14_dinov2.lvd142m`), and timm is asked.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.models.abilities import Abilities, check_patches
from dist_train.ranges import check_section

CNNS = {"resnet18": 8, "resnet50": 16, "efficientnet_b0": 16}
"""The paper's backbones without a [CLS] token, with their layers behind the stem as timm counts them."""


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
VIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""Channels, blocks and attention heads, as in timm."""


def vit_shape(backbone: str) -> ViTShape | None:
    """Shape of the vision transformer of that paper's name; None for any other name."""
    match = re.fullmatch(rf"vit_({'|'.join(VIT_SIZES)})_patch([1-9][0-9]*)", backbone)
    return ViTShape(match[1], int(match[2]), *VIT_SIZES[match[1]]) if match else None


def is_paper_name(backbone: str) -> bool:
    """Whether the name is one of the paper's; any other is timm's."""
    return backbone in CNNS or vit_shape(backbone) is not None


def check_name(backbone: str) -> None:
    """Raise UseError for a name that neither the paper nor timm has, with what was probably meant."""
    if is_paper_name(backbone):
        return
    import timm  # slow, and the only one that knows

    import dist_train.models.own  # noqa: F401  # and what it is told

    architecture, _, tag = backbone.partition(".")
    if re.fullmatch(r"\w+", architecture) and timm.is_model(architecture):
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            there_are = f"there are {', '.join(sorted(tags))}" if tags else "it has none"
            nearest = difflib.get_close_matches(tag, tags, n=1)
            meant = f"did you mean {architecture}.{nearest[0]}? " if nearest else ""
            raise UseError(f"model.backbone: timm has no weights {tag!r} of {architecture}; {meant}{there_are}")
        return
    papers = [*CNNS, *(f"vit_{size}_patch{patch}" for size in VIT_SIZES for patch in (4, 8, 16, 32))]
    # As others write it: google/vit-base-patch16-224.
    plain = architecture.lower().rpartition("/")[2].replace("-", "_")
    nearest = difflib.get_close_matches(plain, [*papers, *timm.list_models()], n=1, cutoff=0.75)
    if plain in [f"vit_{size}" for size in VIT_SIZES]:
        nearest = [f"{plain}_patch16"]
    advice = f"did you mean {nearest[0]}? There are" if nearest else "there are"
    raise UseError(
        f"model.backbone: {backbone!r} is unknown; {advice} {', '.join(CNNS)}, "
        f"vit_{{{','.join(VIT_SIZES)}}}_patch{{N}} and what `dist-train models` lists"
    )


def abilities(backbone: str, image_size: int) -> Abilities:
    """What a backbone can do with images of `image_size` pixels a side. Raises UseError for an unknown name, and for
    a size that it does not take."""
    shape = vit_shape(backbone)
    if shape is not None:
        return Abilities(True, True, True, False, True, shape.depth)
    if backbone in CNNS:
        return Abilities(False, False, False, True, True, CNNS[backbone])
    check_name(backbone)
    from dist_train.models.timm_models import inspect  # imports torch and timm

    return inspect(backbone, image_size).can


def check_image_size(backbone: str, image_size: int) -> None:
    """Raise UseError if the patches of which the name of `backbone` speaks do not fill an image of `image_size` pixels
    a side exactly."""
    patch = re.search(r"_patch([1-9][0-9]*)", backbone)
    side = int(patch[1]) if patch else 1
    own = ""
    if vit_shape(backbone) is not None:
        patches = ", ".join(str(patch) for patch in range(2, image_size + 1) if image_size % patch == 0)
        own = f", or one of the patch sizes {patches}"
    check_patches(backbone, side, image_size, own)


def check_weights(source: str) -> None:
    """Raise UseError where model.weights names no file or folder that is there."""
    if source in ("none", "hub") or source.startswith("hub:"):
        return
    # `:ema` and the like may follow a folder.
    if not any(os.path.exists(path) for path in (source, source.rpartition(":")[0] or source)):
        if Path(source).suffix in FILE_TYPES:
            raise UseError(f"model.weights: there is no file {source}")
        raise UseError(
            f"model.weights: {source!r} is not none, hub, hub:TAG or a file of type {', '.join(FILE_TYPES)}, "
            "nor the folder of a run or checkpoint that is there"
        )


def check_model(config: ModelConfig, image_size: int) -> None:
    """Raise UseError for a model section that no model can be built of, for images of `image_size` pixels a side."""
    check_section("model", config)
    check_name(config.backbone)
    check_image_size(config.backbone, image_size)
    can = abilities(config.backbone, image_size)
    if config.head != "cls" and not can.per_block:
        raise UseError(
            f"model.head: {config.head} needs the [CLS] token of every block of a sequence of blocks, "
            f"and {config.backbone} has none; use cls, or another backbone (`dist-train models` says which)"
        )
    if config.text_tokens > 0 and not can.text:
        raise UseError(
            f"model.text_tokens: {config.backbone} takes no text; use 0, or a vit_ backbone (`dist-train models`)"
        )
    if config.checkpoint_blocks and can.batch_norms:
        raise UseError(
            f"model.checkpoint_blocks: {config.backbone} would count each batch twice in its running statistics; "
            "use false, or a backbone without batch norms"
        )
    if config.checkpoint_blocks and not can.recomputes:
        raise UseError(f"model.checkpoint_blocks: timm's {config.backbone} cannot; use false")
    if config.freeze in ("none", "backbone"):
        return
    if not config.freeze.isdecimal() or int(config.freeze) > can.layers:
        what = "blocks" if can.tokens else "layers"
        raise UseError(
            f"model.freeze is {config.freeze!r}; use none, backbone or a number of {what} from 0 to {can.layers}"
        )
