"""Twelve families of timm in small, each registered with timm under a name of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import register_model
from torch import nn


@dataclass(frozen=True)
class Family:
    """A small model of a family, the image size that suits it, and what is known of it, from its paper and code."""

    of: str
    changes: dict[str, Any] = field(default_factory=dict)
    image_size: int = 32
    blocks: int = 0
    """Of a sequence of tokens; 0: it is none."""
    has_cls: bool = True
    text: bool = False
    batch_norms: bool = False

    @property
    def per_block(self) -> bool:
        """Whether it gives every block's [CLS]."""
        return self.blocks > 0 and self.has_cls


SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES = {
    "tiny_vit": Family("vit_tiny_patch16_224", SMALL, blocks=2, text=True),
    "tiny_deit3": Family("deit3_small_patch16_224", SMALL, blocks=2, text=True),
    "tiny_beit": Family("beit_base_patch16_224", SMALL, blocks=2),
    "tiny_eva02": Family("eva02_tiny_patch14_224", SMALL, image_size=28, blocks=2),
    "tiny_dinov2": Family("vit_small_patch14_reg4_dinov2", SMALL, image_size=28, blocks=2, text=True),
    "tiny_dinov3": Family("vit_small_patch16_dinov3", SMALL, blocks=2),
    "tiny_siglip": Family("vit_base_patch16_siglip_224", SMALL, blocks=2, has_cls=False, text=True),
    "tiny_convnext": Family("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, image_size=64),
    "tiny_swin": Family(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        image_size=64,
    ),
    "tiny_efficientnet": Family("test_efficientnet", batch_norms=True),
    "tiny_resnet": Family("test_resnet", batch_norms=True),
    "tiny_mobilenetv4": Family("mobilenetv4_conv_small_035", batch_norms=True, image_size=64),
}


def _register(name: str, family: Family) -> None:
    def entrypoint(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return timm.models.model_entrypoint(family.of)(pretrained, **{**family.changes, **arguments})

    entrypoint.__name__, entrypoint.__module__ = name, __name__
    register_model(entrypoint)


for _name, _family in FAMILIES.items():
    _register(_name, _family)
