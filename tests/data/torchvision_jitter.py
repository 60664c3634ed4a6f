"""torchvision's jitter in the order that is promised: what every form of the colour change is held to."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import functional

from dist_train.data.augment import Augmentation


def torchvisions(image: Tensor, augmentation: Augmentation, i: int) -> Tensor:
    """The image, (3, H, W), float in [0, 1] or uint8, after jitter and flip with the i-th parameters."""
    image = functional.adjust_brightness(image, augmentation.brightness[i])
    image = functional.adjust_contrast(image, augmentation.contrast[i])
    image = functional.adjust_saturation(image, augmentation.saturation[i])
    if augmentation.hue[i]:  # a hue of 0 is not asked for: it rounds to float32 all the same
        image = functional.adjust_hue(image, augmentation.hue[i])
    return image.flip(2) if augmentation.flip[i] else image
