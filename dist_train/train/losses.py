"""What a micro-batch is trained for: cross-entropy with label smoothing, class weights and mixed labels, or for tags
binary cross-entropy."""

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
        self.smoothing, self.positive_weight = config.label_smoothing, config.positive_weight
        weighted = config.class_weights != "none"
        self.weights = class_weights(config, class_counts).to(device) if weighted else None

    def __call__(self, logits: Tensor, labels: Tensor, sample_weights: Tensor, mix: Mix | None = None) -> Tensor:
        """Scalar loss of logits (B, classes), float32; labels (B,), or bool tags (B, classes); sample_weights (B,).

        Stand-ins for samples that cannot be used have weight 0; the sum is divided by the full micro-batch all the
        same, so that every other sample counts as much as ever. The loss of a mixed sample is that of its two labels,
        each with its class's weight, in the proportion of the mix; for tags that is the loss of the mixed targets.
        """
        losses = self._losses(logits, labels)
        if mix is not None:
            losses = mix.share * losses + (1 - mix.share) * self._losses(logits, mix.partner_labels)
        return (losses * sample_weights).sum() / len(losses)

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dtype == torch.bool:
            return tag_losses(logits, labels, self.smoothing, self.positive_weight)
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.smoothing)
        return losses if self.weights is None else losses * self.weights[labels]


def tag_losses(logits: Tensor, tags: Tensor, smoothing: float = 0.0, positive_weight: float = 1.0) -> Tensor:
    """(B,) binary cross-entropy of each sample, its mean over the tags, as in timm and PyTorch (ML-Decoder takes the
    sum); logits (B, T), float32; tags (B, T) bool.

    Smoothing s makes the targets (1 - s) t + s / T, as timm's BinaryCrossEntropy does. The term of a tag that the
    sample has counts positive_weight times.
    """
    targets = tags.to(logits.dtype) * (1 - smoothing) + smoothing / tags.shape[1]
    positive = None if positive_weight == 1 else torch.full_like(logits[0], positive_weight)
    losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive, reduction="none")
    return losses.mean(dim=1)
