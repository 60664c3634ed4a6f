"""Each training sample's random parameters: a pure function of (seed, epoch, sample).

The paper's augmentation: resize to a square of (image_size + crop_margin), crop image_size at a random whole-pixel
offset, flip left-right, jitter brightness, contrast, saturation and hue, normalise.

The jitter is torchvision's ColorJitter, its ranges and its arithmetic (`torchvision.transforms.v2.functional` on
floats), but for the order, which torchvision draws for each image: here it is always brightness, contrast, saturation,
hue. Brightness multiplies; contrast blends with the mean grey of the image as brightness has left it; saturation blends
each pixel with its own grey; hue turns it in HSV; each step clips. On the CPU `colour.py` computes it, on a GPU
`colour_triton.py`, or `colour_torch.py` where there is no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.draws import Draw, uniform

_DRAWS = 7
_CROP_Y, _CROP_X, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(_DRAWS)

GREY = (0.2989, 0.587, 0.114)
"""What torchvision weights red, green and blue with for a pixel's grey."""


@dataclass(frozen=True)
class Augmentation:
    """Random parameters of B samples.

    crop: (B, 2) int32, (y, x) offset of the crop in the resized square, pixels. flip: (B,) bool. brightness, contrast,
    saturation: (B,) factors. hue: (B,) turns of the colour circle, positive from red towards yellow.
    """

    crop: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]


def draw_augmentation(
    config: DataConfig, seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]
) -> Augmentation:
    """Parameters of the given samples (indexes in the manifest's order) in the given epochs, (B,) each."""
    drawn = uniform(seed, Draw.AUGMENTATION, epochs, samples, np.arange(_DRAWS)[:, None])  # (draws, B), all at once

    def factor(what: int, strength: float) -> NDArray[np.float64]:
        return 1 + strength * (2 * drawn[what] - 1)

    return Augmentation(
        crop=(drawn[[_CROP_Y, _CROP_X]] * (config.crop_margin + 1)).astype(np.int32).T,
        flip=(drawn[_FLIP] < 0.5) & config.flip,
        brightness=factor(_BRIGHTNESS, config.brightness),
        contrast=factor(_CONTRAST, config.contrast),
        saturation=factor(_SATURATION, config.saturation),
        hue=config.hue * (2 * drawn[_HUE] - 1),
    )


def no_augmentation(samples: int) -> Augmentation:
    """Parameters that leave an image as it is, for evaluation."""
    one = np.ones(samples)
    return Augmentation(np.zeros((samples, 2), np.int32), np.zeros(samples, bool), one, one, one, np.zeros(samples))


def colour_parameters(augmentation: Augmentation) -> NDArray[np.float32]:
    """(B, 5), what the colour change of B images takes: factors of brightness, contrast and saturation, the turn of the
    hue in [0, 1], and 1 for a flip, else 0."""
    parameters = np.empty((len(augmentation.flip), 5), np.float32)
    parameters[:, 0], parameters[:, 1] = augmentation.brightness, augmentation.contrast
    parameters[:, 2], parameters[:, 3] = augmentation.saturation, augmentation.hue % 1
    parameters[:, 4] = augmentation.flip
    return parameters
