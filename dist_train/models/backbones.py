"""The vision transformers under the paper's names (`names.py`); timm's own models are in `timm_models.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from timm.models import VisionTransformer, checkpoint
from torch import Tensor, nn
from torch.nn import functional

from dist_train.models.cls_token import take_cls, take_cls_and_average
from dist_train.models.heads import Features
from dist_train.models.names import ViTShape, is_paper_name, vit_shape
from dist_train.models.timm_models import timm_arguments


def timm_name(backbone: str, image_size: int) -> tuple[str, dict[str, int]]:
    """The timm call that matches a backbone: `timm.create_model(name, num_classes=..., **arguments)`.

    `("vit_base_patch16", 128)` gives `("vit_base_patch16_224", {"img_size": 128})`. Patch sizes that timm has no
    name for become an argument: `("vit_tiny_patch8", 64)` gives
    `("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8})`. A CNN has no arguments. Layer norms there have
    epsilon 1e-6; dropout and epsilon are no weights and so not part of the answer. Any other name is timm's own.
    """
    shape = vit_shape(backbone)
    if shape is None:
        return backbone, {} if is_paper_name(backbone) else timm_arguments(backbone, image_size)
    name = f"{backbone}_224"
    if timm.is_model(name):
        return name, {"img_size": image_size}
    return f"vit_{shape.size}_patch16_224", {"img_size": image_size, "patch_size": shape.patch}


class LayerNorm(nn.LayerNorm):
    """A layer norm whose output is of its input's type; its sums are float32 in any case.

    Under autocast torch's own always gives float32, so that every token would be written in twice the bytes.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) normalised over the last dimension."""
        if tokens.dtype == self.weight.dtype:
            return super().forward(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            weight, bias = self.weight.to(tokens.dtype), self.bias.to(tokens.dtype)
            return functional.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps)


class TokenTransformer(VisionTransformer):
    """timm's vision transformer without its classifier, giving [CLS] tokens and taking text tokens.

    Parameter names are timm's. It is a subclass, not a wrapper, because ZeRO-3 gathers a module's own parameters
    (the [CLS] token, the position embeddings) when that module's forward runs.
    """

    def __init__(
        self,
        shape: ViTShape,
        image_size: int,
        features: Features,
        dropout: float,
        norm_eps: float,
        drop_path: float = 0.0,
    ) -> None:
        """`features`: what the head reads. The final layer norm is left out where it would be unused."""
        super().__init__(
            img_size=image_size,
            patch_size=shape.patch,
            num_classes=0,
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            final_norm=features == "pooled",
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,  # after the attention's projection and both layers of the MLP
            drop_path_rate=drop_path,
            norm_layer=partial(LayerNorm, eps=norm_eps),
        )
        self.features = features
        self.token_dtype: torch.dtype | None = None
        """Type of the tokens between the blocks (the residual stream); None: what the embedding gives."""

    def forward(self, images: Tensor, text: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """[CLS] tokens of images (B, 3, H, W), joined by embedded text tokens (B, T, D) if given.

        `attention_mask`, bool, broadcastable to (B, heads, S, S), is True where a token (third axis) may attend to
        another (fourth axis). Returns what `features` says, see `heads.Features`.
        """
        tokens = self._pos_embed(self.patch_embed(images))
        if text is not None:
            tokens = torch.cat([tokens, text], dim=1)
        if self.token_dtype is not None:
            tokens = tokens.to(self.token_dtype)
        per_block = []
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, attn_mask=attention_mask)
            else:
                tokens = block(tokens, attn_mask=attention_mask)
            if self.features == "pooled":
                continue
            if self.features == "cls":
                tokens, taken = take_cls(tokens)
            else:
                tokens, taken = take_cls_and_average(tokens, 1, self.patch_embed.num_patches)
            per_block.append(taken)
        if self.features == "pooled":
            return self.norm(tokens[:, 0])
        return torch.stack(per_block, dim=-1)


def count_image_tokens(backbone: Any) -> int:
    """Tokens of an image in a backbone that is a sequence of them, the [CLS] and registers included."""
    return int(backbone.num_prefix_tokens + backbone.patch_embed.num_patches)


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone that is a sequence of them, all of one kind; [] for any other."""
    return list(backbone.blocks) if hasattr(backbone, "num_prefix_tokens") and hasattr(backbone, "blocks") else []  # type: ignore[arg-type]
