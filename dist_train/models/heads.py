"""The two heads: CLS on the last [CLS] token, IFA on the [CLS] tokens of all blocks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional


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


def initialise_classifier(head: CLSHead | IFAHead, head_init: Literal["reference", "zero", "default"]) -> None:
    """Set the start of the classifier: zero, or what PyTorch gave it.

    `reference` is zero for the CLS head and PyTorch's for the IFA head, as in the paper's code; a comparison of the
    two heads alone needs `zero` or `default`. The other layers of the IFA head always keep PyTorch's defaults.
    """
    if head_init == "zero" or (head_init == "reference" and isinstance(head, CLSHead)):
        nn.init.zeros_(head.classifier.weight)
        nn.init.zeros_(head.classifier.bias)
