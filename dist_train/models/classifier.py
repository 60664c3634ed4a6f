"""The model: images, and text if it reads any, in; logits out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.models.backbones import count_image_tokens
from dist_train.models.heads import HeadModule
from dist_train.models.vilt import TextEmbeddings, keep_padding_out


class Classifier(nn.Module):
    """Backbone, head, and text embeddings for a ViLT (`text` is None for a model of images alone)."""

    def __init__(self, backbone: nn.Module, head: HeadModule, text: TextEmbeddings | None, mask_padding: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text
        self.head = head
        self.mask_padding = mask_padding
        self.frozen: list[nn.Module] = []
        """Parts that stay in evaluation mode."""
        self.autocast: torch.dtype | None = None
        """What torch's autocast computes matrix products in; None: the type of the weights."""
        self.feature_shape: tuple[int, ...] | None = None
        """Shape, without the batch, of the backbone's features that are given for images; None: images are given."""

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, but frozen parts neither drop anything nor change their running statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def recompute_blocks(self, on: bool) -> None:
        """Keep no activations inside of the backbone's blocks but compute them again in the backward pass; or not."""
        self.backbone.set_grad_checkpointing(on)  # type: ignore[operator]

    def forward(self, images: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W), float; or of their features, where those are given.

        A ViLT also needs `text_ids` (B, T), int64, and `text_mask` (B, T), bool, True for real tokens; a model of
        images alone takes neither. Raises ValueError where that is not so.
        """
        with self._arithmetic(images):
            return self._logits(images, text_ids, text_mask)

    def features(self, images: Tensor) -> Tensor:
        """What the head of a model without text reads of images (B, 3, H, W); see `heads.Features`."""
        with self._arithmetic(images):
            return self.backbone(images)

    def _arithmetic(self, images: Tensor) -> AbstractContextManager[Any]:
        # In here and not around the model: DeepSpeed's engine switches an autocast around it off, on GPUs alone.
        if self.autocast is None or images.is_meta:  # on the meta device nothing is computed
            return nullcontext()
        return torch.autocast(images.device.type, self.autocast)

    def _logits(self, images: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        if (text_ids is None) != (self.text is None):
            raise ValueError("a ViLT needs text_ids; a model of images alone takes none")
        if self.feature_shape is not None:
            return self.head(images)
        if self.text is None:
            return self.head(self.backbone(images))
        attention_mask = None
        if self.mask_padding:
            if text_mask is None:
                raise ValueError("mask_padding needs text_mask")
            image_tokens = count_image_tokens(self.backbone)
            attention_mask = keep_padding_out(text_mask, image_tokens)
        return self.head(self.backbone(images, self.text(text_ids), attention_mask))
