"""Each training sample's random parameters: a pure function of (seed, epoch, sample).

The paper's augmentation: resize to a square of (image_size + crop_margin), crop image_size at a random whole-pixel
offset, flip left-right, jitter brightness, contrast, saturation and hue, normalise.

Brightness, contrast, saturation and hue are one affine map of RGB, composed as in DALI's `color_twist`: saturation
scales and hue turns the chrominance plane of YIQ, then contrast scales around mid-grey (128), then brightness scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.draws import uniform

_AUGMENT = 3  # first counter of a draw: what it is for (the plan has 1 and 2)
_DRAWS = 7
_CROP_Y, _CROP_X, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(_DRAWS)

# RGB in [0, 1] to YIQ, with the rounded coefficients that DALI uses, so that both devices compute the same map.
RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
YIQ_TO_RGB = np.linalg.inv(RGB_TO_YIQ)
MID_GREY = 128.0


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
    drawn = uniform(seed, _AUGMENT, epochs, samples, np.arange(_DRAWS)[:, None])  # (draws, B), all at once

    def factor(what: int, strength: float) -> NDArray[np.float64]:
        return 1 + strength * (2 * drawn[what] - 1)

    return Augmentation(
        crop=(np.stack([drawn[_CROP_Y], drawn[_CROP_X]], axis=1) * (config.crop_margin + 1)).astype(np.int32),
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


def colour_maps(augmentation: Augmentation) -> NDArray[np.float32]:
    """(B, 3, 4): the affine map of RGB in [0, 255], before clipping to that range; last column the constant."""
    turn = -2 * np.pi * augmentation.hue  # a turn from red to yellow is negative in the (I, Q) plane
    cos, sin = augmentation.saturation * np.cos(turn), augmentation.saturation * np.sin(turn)
    chroma = np.zeros((len(turn), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1], chroma[:, 1, 2] = cos, -sin
    chroma[:, 2, 1], chroma[:, 2, 2] = sin, cos
    gain = augmentation.brightness * augmentation.contrast
    maps = np.empty((len(turn), 3, 4), np.float32)
    maps[:, :, :3] = gain[:, None, None] * (YIQ_TO_RGB @ chroma @ RGB_TO_YIQ)
    maps[:, :, 3] = (augmentation.brightness * (1 - augmentation.contrast) * MID_GREY)[:, None]
    return maps
