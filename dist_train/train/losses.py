"""What a micro-batch is trained for: cross-entropy with label smoothing, class weights and mixed labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dist_train.config import OptimConfig
from dist_train.train.mixing import Mix


def class_weights(config: OptimConfig, counts: Sequence[int]) -> Tensor:
    """(classes,) float32 weights for classes of `counts` images; the mean over the images is 1.

    effective: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", equation 2.
    """
    images = torch.tensor(counts, dtype=torch.float64)
    known = images.clamp(min=1)  # a class without images has no samples to weigh
    if config.class_weights == "none":
        rarity = torch.ones_like(images)
    elif config.class_weights == "inverse":
        rarity = 1 / known
    else:
        beta = config.class_weights_beta
        rarity = (1 - beta) / (1 - beta**known)
    return (rarity * images.sum() / (rarity * images).sum()).float()


class Objective:
    """The loss of a micro-batch."""

    def __init__(self, config: OptimConfig, class_counts: Sequence[int], device: torch.device) -> None:
        """class_counts: images of each class, by id."""
        self.smoothing = config.label_smoothing
        weighted = config.class_weights != "none"
        self.weights = class_weights(config, class_counts).to(device) if weighted else None

    def __call__(self, logits: Tensor, labels: Tensor, sample_weights: Tensor, mix: Mix | None = None) -> Tensor:
        """Scalar loss of logits (B, classes), float32; labels (B,); sample_weights (B,).

        Stand-ins for samples that cannot be used have weight 0; the sum is divided by the full micro-batch all the
        same, so that every other sample counts as much as ever. The loss of a mixed sample is that of its two labels,
        each with its class's weight, in the proportion of the mix.
        """
        losses = self._losses(logits, labels)
        if mix is not None:
            losses = mix.share * losses + (1 - mix.share) * self._losses(logits, mix.partner_labels)
        return (losses * sample_weights).sum() / len(losses)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        return losses if self.weights is None else losses * self.weights[labels]
