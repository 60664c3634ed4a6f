"""The heads: what makes logits of a backbone's features. `HEADS` has them by name.

Beside `cls` all of them read every block, where the tokens are not normalised yet and grow from block to block: in
DINOv2's ViT-S the [CLS] of the last block is 26 times as long as that of the first. Where features of several blocks
stand side by side, a layer norm of each token brings them to one scale first, as DINOv2's evaluation applies the
backbone's final norm to each (Oquab et al. 2023) and the probe in benchmarks/claims/probe.py does. The norms here are
the heads' own; the backbone's final norm is not used where a head reads the blocks.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Features = Literal["pooled", "cls", "cls_and_average"]
"""What a backbone gives its head. pooled: (B, D), the normalised [CLS] of a ViT's last block, or what its timm model
pools. cls: (B, D, L), the [CLS] after each of the L blocks, not normalised. cls_and_average: (B, 2 D, L), that and
below it the average of the patches' tokens after the block, without text."""
LAST_BLOCKS = 4
"""Whose [CLS] the head `last_n` reads: as many as DINO's and DINOv2's evaluations."""


class CLSHead(nn.Module):
    """A linear classifier on one feature vector: the last [CLS] token, or the pooled features of a CNN."""

    reads: ClassVar[Features] = "pooled"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, num_classes)."""
        return self.classifier(features)


class MeanHead(nn.Module):
    """The mean of the blocks' [CLS] tokens, layer norm, linear classifier: IFA without anything to learn in it."""

    reads: ClassVar[Features] = "cls"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """[CLS] tokens of every block, (B, D, L), to logits (B, num_classes)."""
        return self.classifier(self.norm(cls_tokens.mean(dim=-1)))


class IFAHead(nn.Module):
    """Intermediate feature aggregation (the paper, section on IFA): one learned mixture of the blocks' [CLS] tokens.

    The L values of each channel become one by L weights and a bias that all channels share; then ReLU, layer norm
    and a linear classifier. Its layer norm takes the place of the backbone's final one, so a model with this head
    has L + 1 parameters more than one with the CLS head.
    """

    reads: ClassVar[Features] = "cls"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.aggregate = nn.Linear(depth, 1)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """[CLS] tokens of every block, (B, D, L), to logits (B, num_classes)."""
        mixture = self.aggregate(cls_tokens).squeeze(-1)
        return self.classifier(self.norm(functional.relu(mixture)))


class LastBlocksHead(nn.Module):
    """The [CLS] tokens of the last 4 blocks side by side, each through one layer norm, and a linear classifier.

    It is the linear evaluation of DINO (Caron et al. 2021) and DINOv2. A backbone of fewer blocks gives all.
    """

    reads: ClassVar[Features] = "cls"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(min(LAST_BLOCKS, depth) * dim, num_classes)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """[CLS] tokens of every block, (B, D, L), to logits (B, num_classes)."""
        last = cls_tokens[:, :, -LAST_BLOCKS:].transpose(1, 2)
        return self.classifier(self.norm(last).flatten(1))


class AllLayersHead(nn.Module):
    """Every block's [CLS] and average of the patches side by side, each through one layer norm, and a linear
    classifier. It has 2 L times the weights of the CLS head's classifier."""

    reads: ClassVar[Features] = "cls_and_average"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(2 * depth * dim, num_classes)

    def forward(self, cls_and_average: Tensor) -> Tensor:
        """[CLS] and average of every block, (B, 2 D, L), to logits (B, num_classes)."""
        return self.classifier(self.norm(_side_by_side(cls_and_average)).flatten(1))


class AttentiveHead(nn.Module):
    """One learned query attends over every block's [CLS] and average of the patches; then a linear classifier.

    After "Beyond the Final Layer: Attentive Multi-Layer Fusion for Vision Transformers" (Ciernik et al. 2026, arXiv
    2601.09322): layer norm of the tokens, multi-head attention of a single query, projection, norm, classifier. Three
    things differ from the authors' code. As the query is the same for all images, its product with the projection of
    the keys is learned directly, a vector of scores for each attention head, and the values are projected after they
    have been averaged: the same function at 1/(2 L) of the products. The attention heads have 64 channels, as the
    backbone's, not twice as many. And the last norm is a layer norm where they have batch norm, which would make a
    sample's logits depend on the micro-batch.
    """

    reads: ClassVar[Features] = "cls_and_average"

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.norm_tokens = nn.LayerNorm(dim, eps=norm_eps)
        self.score = nn.Linear(dim, heads, bias=False)
        self.value = _ValuePerHead(dim, heads)
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, cls_and_average: Tensor) -> Tensor:
        """[CLS] and average of every block, (B, 2 D, L), to logits (B, num_classes)."""
        tokens = self.norm_tokens(_side_by_side(cls_and_average))
        attention = self.score(tokens).softmax(dim=1)
        values = self.value(attention.transpose(1, 2) @ tokens)
        return self.classifier(self.norm(self.project(values)))


class _ValuePerHead(nn.Module):
    """A linear layer of its own for each attention head, from D channels to D / heads."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        bound = dim**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(heads, dim, dim // heads).uniform_(-bound, bound))

    def forward(self, pooled: Tensor) -> Tensor:
        """What each head has averaged, (B, heads, D), to (B, D)."""
        return torch.einsum("bhd,hdk->bhk", pooled, self.weight).flatten(1)


def _side_by_side(cls_and_average: Tensor) -> Tensor:
    """(B, 2 D, L) as 2 L tokens, (B, 2 L, D): block by block, the [CLS] and then the average."""
    batch, channels, depth = cls_and_average.shape
    return cls_and_average.transpose(1, 2).reshape(batch, 2 * depth, channels // 2)


HeadModule = CLSHead | MeanHead | IFAHead | LastBlocksHead | AllLayersHead | AttentiveHead
"""A head: `reads` says what of a backbone; its last layer is called `classifier`."""
HEADS: dict[str, type[HeadModule]] = {
    "cls": CLSHead,
    "mean": MeanHead,
    "ifa": IFAHead,
    "last_n": LastBlocksHead,
    "all_layers": AllLayersHead,
    "attentive": AttentiveHead,
}
"""All heads by the names of ModelConfig.head. Each is built by channels, blocks, classes and epsilon of its norms."""
OWN_PREFIXES = {name: f"{name}." for name in HEADS if name != "cls"}
"""What the plain names (`weights.to_plain_names`) of a head begin with where timm's models have none such."""


def head_name(head: HeadModule) -> str:
    """Its name in `HEADS`."""
    return next(name for name, kind in HEADS.items() if type(head) is kind)


def initialise_head(head: HeadModule, head_init: Literal["reference", "zero", "default", "mean", "last"]) -> None:
    """Set the start of the head; what is not named here keeps PyTorch's default.

    `reference` is a zero classifier for the CLS head and PyTorch's for all others, as in the paper's code for CLS and
    IFA; a comparison of heads alone needs one of the others. `zero` is a zero classifier for any. `mean` makes IFA's
    aggregation the mean over the blocks, with bias 0, and the attention of the attentive head the mean over its tokens;
    `last` makes that aggregation the last block.
    PyTorch's default draws the bias of IFA, which all channels share, from +-1/sqrt(L): far more than the [CLS] tokens
    of an untrained transformer, so that a negative one leaves every channel behind the ReLU.
    """
    if head_init == "zero" or (head_init == "reference" and isinstance(head, CLSHead)):
        nn.init.zeros_(head.classifier.weight)
        nn.init.zeros_(head.classifier.bias)
    if head_init in ("mean", "last") and isinstance(head, IFAHead):
        nn.init.constant_(head.aggregate.weight, 1 / head.aggregate.in_features if head_init == "mean" else 0.0)
        nn.init.zeros_(head.aggregate.bias)
    if head_init == "last" and isinstance(head, IFAHead):
        nn.init.ones_(head.aggregate.weight[:, -1:])
    if head_init == "mean" and isinstance(head, AttentiveHead):
        nn.init.zeros_(head.score.weight)
