"""The GPU's graph, built of the same operators for the CPU, and the colour change: pixels of the compiled passes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import pipeline_def
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, colour_parameters, draw_augmentation, no_augmentation
from dist_train.data.colour_torch import change_colours
from dist_train.data.graph import crop_input, gpu_graph
from dist_train.data.pipeline import ImagePipeline
from tests.harness import smooth_image

CONFIG = DataConfig(image_size=96, crop_margin=24, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
SQUARE = CONFIG.image_size + CONFIG.crop_margin


def photo_like(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """A smooth picture with noise in it, so that what is done to pixels shows, as a PNG: every decoder agrees on it."""
    pixels = np.asarray(smooth_image(number, width, height), np.float64)
    pixels += np.random.default_rng(number).normal(0, 8, pixels.shape)
    return png(np.clip(pixels, 0, 255).astype(np.uint8))


def png(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


def compiled(
    images: list[NDArray[np.uint8]], augmentation: Augmentation, config: DataConfig, train: bool, baked: int | None
) -> NDArray[np.float64]:
    """What the CPU's pipeline makes of a batch, in RGB 0..255: (B, 3, S, S)."""
    pipeline = ImagePipeline(
        config, train=train, baked=baked, batch_size=len(images), threads=1, device_id=None, depth=1
    )
    pipeline.feed(images, augmentation)
    pixels = pipeline.take()
    pipeline.close()
    return denormalised(pixels.numpy(), config)


def of_gpu_graph(
    images: list[NDArray[np.uint8]], augmentation: Augmentation, config: DataConfig, train: bool, baked: int | None
) -> NDArray[np.float64]:
    """What the GPU's graph and the colour change after it make of it, computed by the CPU."""
    cut_only = baked == (config.image_size + config.crop_margin if train else config.image_size)
    pipeline = pipeline_def(gpu_graph)(
        config, train, cut_only, "cpu", batch_size=len(images), num_threads=1, device_id=None
    )
    inputs: dict[str, Any] = {"images": images}
    if train:
        inputs["crop"] = crop_input(augmentation, cut_only)
    for name, values in inputs.items():
        pipeline.feed_input(name, values)
    (output,) = pipeline.run()
    pixels = torch.from_dlpack(output.as_tensor())
    assert pixels.dtype == torch.uint8
    parameters = torch.from_numpy(colour_parameters(augmentation))
    return 255 * change_colours(pixels, parameters, (1 / 255,) * 3, (0.0,) * 3).double().numpy()


def denormalised(pixels: NDArray[np.float32], config: DataConfig) -> NDArray[np.float64]:
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (config.mean, config.std))
    return 255 * (pixels.astype(np.float64) * std + mean)


@pytest.mark.parametrize(
    "train, baked, mean, highest",
    [
        (True, SQUARE, 1e-3, 1e-2),
        (True, None, 0.02, 3.0),
        (False, None, 0.02, 3.0),
        (False, CONFIG.image_size, 1e-3, 1e-3),
    ],
    ids=["cut", "resized", "evaluation", "evaluation as it is"],
)
def test_the_gpus_graph_has_the_pixels_of_the_compiled_passes(
    train: bool, baked: int | None, mean: float, highest: float
) -> None:
    sizes = [(baked, baked)] * 8 if baked else [(200, 130), (96, 96), (50, 300), (120, 120)] * 2
    images = [photo_like(i, *size) for i, size in enumerate(sizes)]
    samples = np.arange(len(images))
    augmentation = draw_augmentation(CONFIG, 5, np.zeros_like(samples), samples) if train else no_augmentation(8)
    one, other = (make(images, augmentation, CONFIG, train, baked) for make in (compiled, of_gpu_graph))
    assert one.shape == other.shape == (8, 3, CONFIG.image_size, CONFIG.image_size)
    assert np.abs(one - other).mean() < mean
    assert np.abs(one - other).max() < highest
