"""Each training sample's random parameters: a pure function of (seed, epoch, sample), and of the image's size.

What is done to an image, in this order, the one of timm and of torchvision's reference recipe:

1. crop. `squash`, the paper's: resize to a square of (image_size + crop_margin) and cut image_size at a random
   whole-pixel offset. `random_resized`: cut a box of random area and aspect and resize it (`crops.py`);
2. flip left-right;
3. RandAugment or TrivialAugment (`auto_augment.py`);
4. jitter brightness, contrast, saturation and hue; or lose the colours, in place of the last two;
5. blur;
6. normalise;
7. erase a box, to 0, which is data.mean.

The jitter is torchvision's ColorJitter, its ranges and its arithmetic (`torchvision.transforms.v2.functional` on
floats), but for the order, which torchvision draws for each image: here it is always brightness, contrast, saturation,
hue. Brightness multiplies; contrast blends with the mean grey of the image as brightness has left it; saturation blends
each pixel with its own grey; hue turns it in HSV; each step clips. On the CPU `colour.py` computes it, on a GPU
`colour_triton.py`, or `colour_torch.py` where there is no Triton. The rest is in `resize.py` and `operations.py` for
the CPU, in DALI's operators and `operations_torch.py` for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data import auto_augment, crops
from dist_train.data.draws import Draw, uniform

_ALWAYS_DRAWN = 7
_CROP_Y, _CROP_X, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _ERASING = range(11)
# The numbers of Draw.BOXES: first those of the crop, then those of the box that is erased.
_CROPPED, _ERASED = np.arange(crops.NUMBERS)[:, None], np.arange(crops.NUMBERS, 2 * crops.NUMBERS)[:, None]

GREY = (0.2989, 0.587, 0.114)
"""What torchvision weights red, green and blue with for a pixel's grey."""
BLUR_KERNEL = 9
"""Pixels of the blur's kernel on a side, as in the recipes of DINO."""


@dataclass(frozen=True)
class Augmentation:
    """Random parameters of B samples.

    crop: (B, 2) int32, (y, x) offset of the crop in the resized square, pixels. flip: (B,) bool. brightness, contrast,
    saturation: (B,) factors. hue: (B,) turns of the colour circle, positive from red towards yellow. box: (B, 4) int32,
    y, x, height and width of what is cut out of the image in place of that crop, pixels; (B, 0) where it is not.
    operations, magnitudes: (B, n) of `auto_augment.py`. blur: (B,) standard deviations, pixels; 0: none. erased: (B, 4)
    int32, y, x, height and width of what is erased, pixels of the crop.
    """

    crop: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    box: NDArray[np.int32]
    operations: NDArray[np.int64]
    magnitudes: NDArray[np.float64]
    blur: NDArray[np.float64]
    erased: NDArray[np.int32]


def needs_sizes(config: DataConfig, train: bool) -> bool:
    """Whether where an image is cut depends on its size, which must then be known before it is decoded."""
    return config.crop == "random_resized" if train else config.eval_crop == "center"


def has_operations(config: DataConfig) -> bool:
    """Whether training does anything that `operations.py` has."""
    return config.auto_augment != "none" or bool(config.blur or config.erasing)


def draw_augmentation(
    config: DataConfig,
    seed: int,
    epochs: NDArray[np.int64],
    samples: NDArray[np.int64],
    sizes: NDArray[np.int32] | None = None,
) -> Augmentation:
    """Parameters of the given samples (indexes in the manifest's order) in the given epochs, (B,) each.

    sizes: (B, 2), height and width of the images, which `random_resized` needs.
    """
    rarer = bool(config.grey or config.blur or config.erasing)
    numbers = _ERASING + 1 if rarer else _ALWAYS_DRAWN
    if (epochs == epochs[:1]).all():
        epochs = epochs[:1]  # mixed once
    drawn = uniform(seed, Draw.AUGMENTATION, epochs, samples, np.arange(numbers)[:, None])  # (numbers, B), all at once

    def factor(what: int, strength: float) -> NDArray[np.float64]:
        return 1 + strength * (2 * drawn[what] - 1)

    some: dict[str, NDArray[Any]] = {
        "crop": (drawn[_CROP_Y : _CROP_X + 1] * (config.crop_margin + 1)).astype(np.int32).T,
        "flip": (drawn[_FLIP] < 0.5) & config.flip,
        "brightness": factor(_BRIGHTNESS, config.brightness),
        "contrast": factor(_CONTRAST, config.contrast),
        "saturation": factor(_SATURATION, config.saturation),
        "hue": config.hue * (2 * drawn[_HUE] - 1),
    }
    if config.crop == "random_resized":
        if sizes is None:
            raise ValueError("data.crop random_resized needs the images' sizes")
        numbers_of_crop = uniform(seed, Draw.BOXES, epochs, samples, _CROPPED)
        some["box"] = crops.resized_crops(numbers_of_crop, sizes, config.crop_scale, config.crop_ratio)
    if several := auto_augment.operations_per_image(config):
        indexes = np.arange(several * auto_augment.NUMBERS)[:, None]
        numbers_of_operations = uniform(seed, Draw.AUTO_AUGMENT, epochs, samples, indexes)
        some["operations"], some["magnitudes"] = auto_augment.choose_operations(config, numbers_of_operations)
    if config.grey:
        some |= {key: np.where(drawn[_GREY] < config.grey, 0.0, some[key]) for key in ("saturation", "hue")}
    if config.blur:
        least, most = config.blur_sigma
        some["blur"] = np.where(drawn[_BLUR] < config.blur, least + (most - least) * drawn[_SIGMA], 0.0)
    if config.erasing:
        boxes = crops.erased_boxes(uniform(seed, Draw.BOXES, epochs, samples, _ERASED), config.image_size)
        some["erased"] = boxes * (drawn[_ERASING] < config.erasing)[:, None]
    return replace(no_augmentation(len(samples)), **some)


def no_augmentation(samples: int) -> Augmentation:
    """Parameters that leave an image as it is, for evaluation."""
    one, zero, none = np.ones(samples), np.zeros(samples), np.zeros((samples, 0))
    return Augmentation(
        crop=np.zeros((samples, 2), np.int32),
        flip=np.zeros(samples, bool),
        brightness=one,
        contrast=one,
        saturation=one,
        hue=zero,
        box=none.astype(np.int32),
        operations=none.astype(np.int64),
        magnitudes=none,
        blur=zero,
        erased=np.zeros((samples, 4), np.int32),
    )


def colour_parameters(augmentation: Augmentation) -> NDArray[np.float32]:
    """(B, 5), what the colour change of B images takes: factors of brightness, contrast and saturation, the turn of the
    hue in [0, 1], and 1 for a flip, else 0: also where the image is flipped earlier, as operations on it need."""
    parameters = np.empty((len(augmentation.flip), 5), np.float32)
    parameters[:, 0], parameters[:, 1] = augmentation.brightness, augmentation.contrast
    parameters[:, 2], parameters[:, 3] = augmentation.saturation, augmentation.hue % 1
    parameters[:, 4] = augmentation.flip & (augmentation.operations.shape[1] == 0)
    return parameters


def blur_kernels(sigma: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n, BLUR_KERNEL) weights of torchvision's GaussianBlur for (n,) standard deviations, pixels."""
    places = np.arange(BLUR_KERNEL) - BLUR_KERNEL // 2
    weights = np.exp(-((places / sigma[:, None]) ** 2) / 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
