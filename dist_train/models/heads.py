"""The two heads: CLS on the last [CLS] token, IFA on the [CLS] tokens of all blocks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

Features = Literal["pooled", "cls", "cls_and_average"]
"""What a backbone gives its head. pooled: (B, D), the normalised [CLS] of a ViT's last block, or what its timm model
pools. cls: (B, D, L), the [CLS] after each of the L blocks, not normalised. cls_and_average: (B, 2 D, L), that and
below it the average of the patches' tokens after the block, without text."""


class CLSHead(nn.Module):
    """A linear classifier on one feature vector: the last [CLS] token, or the pooled features of a CNN."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, D) to logits (B, num_classes)."""
        return self.classifier(features)


class IFAHead(nn.Module):
    """Intermediate feature aggregation (the paper, section on IFA): one learned mixture of the blocks' [CLS] tokens.

    The L values of each channel become one by L weights and a bias that all channels share; then ReLU, layer norm
    and a linear classifier. Its layer norm takes the place of the backbone's final one, so a model with this head
    has L + 1 parameters more than one with the CLS head.
    """

    def __init__(self, dim: int, depth: int, num_classes: int, norm_eps: float) -> None:
        super().__init__()
        self.aggregate = nn.Linear(depth, 1)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """[CLS] tokens of every block, (B, D, L), to logits (B, num_classes)."""
        mixture = self.aggregate(cls_tokens).squeeze(-1)
        return self.classifier(self.norm(functional.relu(mixture)))


HeadModule = CLSHead | IFAHead
"""A head; its last layer is called `classifier`."""

HEAD_PREFIXES = {"aggregate": "ifa."}
"""What the plain names (`weights.to_plain_names`) of a head begin with that timm's models do not have, by the name of a
layer that only this head has."""


def initialise_head(head: HeadModule, head_init: Literal["reference", "zero", "default", "mean"]) -> None:
    """Set the start of the head; what is not named here keeps PyTorch's default.

    `reference` is a zero classifier for the CLS head and PyTorch's for the IFA head, as in the paper's code; a
    comparison of the two heads alone needs one of the others. `mean` makes the IFA head's aggregation the mean over the
    blocks, with bias 0. PyTorch's default draws the bias, which all channels share, from +-1/sqrt(L): far more than the
    [CLS] tokens of an untrained transformer, so that a negative one leaves every channel behind the ReLU.
    """
    if head_init == "zero" or (head_init == "reference" and isinstance(head, CLSHead)):
        nn.init.zeros_(head.classifier.weight)
        nn.init.zeros_(head.classifier.bias)
    if head_init == "mean" and isinstance(head, IFAHead):
        nn.init.constant_(head.aggregate.weight, 1 / head.aggregate.in_features)
        nn.init.zeros_(head.aggregate.bias)
