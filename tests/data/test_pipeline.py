"""The pixels: against float64 references written from the definitions, on the same parameters."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import resize

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, draw_augmentation, no_augmentation
from dist_train.data.pipeline import ImagePipeline
from dist_train.data.resize import resize_region
from tests.data.torchvision_jitter import torchvisions
from tests.harness import jpeg_bytes, smooth_image

SIZE, MARGIN = 32, 8
CONFIG = DataConfig(image_size=SIZE, crop_margin=MARGIN, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))


def run_pipeline(
    images: list[bytes],
    augmentation: Augmentation,
    config: DataConfig = CONFIG,
    train: bool = True,
    baked: int | None = None,
) -> NDArray[np.float64]:
    """One batch through the pipeline, back in RGB 0..255: (B, H, W, 3)."""
    pipeline = ImagePipeline(
        config, train=train, baked=baked, batch_size=len(images), threads=1, device_id=None, depth=1
    )
    pipeline.feed([np.frombuffer(image, np.uint8) for image in images], augmentation)
    pixels = pipeline.take().numpy().astype(np.float64)
    pipeline.close()
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (config.mean, config.std))
    return (255 * (pixels * std + mean)).transpose(0, 2, 3, 1)


def triangular_weights(source: int, start: float, length: float, target: int) -> NDArray[np.float64]:
    """(target, source) weights of an antialiased linear resize of [start, start + length) to `target` samples."""
    scale = length / target
    support = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = start + (i + 0.5) * scale
        first, last = int(np.floor(centre - support)), int(np.ceil(centre + support))
        for j in range(max(first, 0), min(last + 1, source)):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / support)
    return weights / weights.sum(axis=1, keepdims=True)


def reference_transform(image: bytes, augmentation: Augmentation, i: int, square: int) -> NDArray[np.float64]:
    """Region resize, then torchvision's jitter, flip; float64 RGB 0..255."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), np.float64)
    height, width = pixels.shape[:2]
    y, x = augmentation.crop[i] / square
    rows = triangular_weights(height, y * height, SIZE / square * height, SIZE)
    columns = triangular_weights(width, x * width, SIZE / square * width, SIZE)
    out = np.einsum("ih,hwc,jw->ijc", rows, pixels, columns)
    planes = torch.from_numpy(out / 255).permute(2, 0, 1)
    return 255 * torchvisions(planes, augmentation, i).permute(1, 2, 0).numpy()


def some_augmentation(count: int) -> Augmentation:
    samples = np.arange(count)
    return draw_augmentation(CONFIG, 5, np.zeros_like(samples), samples)


def test_training_pixels_equal_the_float64_reference() -> None:
    sizes = [(48, 40), (100, 61), (33, 90), (40, 40), (20, 24), (200, 160)]
    images = [jpeg_bytes(i, *size) for i, size in enumerate(sizes * 2)]
    augmentation = some_augmentation(len(images))
    assert augmentation.flip.any() and not augmentation.flip.all()
    got = run_pipeline(images, augmentation)
    for i, image in enumerate(images):
        difference = got[i] - reference_transform(image, augmentation, i, SIZE + MARGIN)
        assert np.abs(difference).mean() < 1.5, (i, np.abs(difference).mean())
        assert abs(difference.mean()) < 0.5, (i, difference.mean())


def test_training_pixels_equal_the_reference_on_real_photos(shared_data: Path) -> None:
    files = sorted((shared_data / "grocery").rglob("*.jpg"))[::400]
    images = [file.read_bytes() for file in files]
    augmentation = some_augmentation(len(images))
    got = run_pipeline(images, augmentation)
    differences = [got[i] - reference_transform(images[i], augmentation, i, SIZE + MARGIN) for i in range(len(images))]
    assert np.mean([np.abs(d).mean() for d in differences]) < 0.5
    assert abs(np.mean([d.mean() for d in differences])) < 0.05


def test_images_baked_to_the_square_are_cut_without_resampling() -> None:
    square = SIZE + MARGIN
    images = [jpeg_bytes(i, square, square) for i in range(6)]
    drawn = some_augmentation(6)
    cut = replace(no_augmentation(6), crop=drawn.crop, flip=drawn.flip)
    got = run_pipeline(images, cut, baked=square)
    for i, image in enumerate(images):
        y, x = drawn.crop[i]
        pixels = np.asarray(Image.open(io.BytesIO(image)), np.float64)[y : y + SIZE, x : x + SIZE]
        expected = pixels[:, ::-1] if drawn.flip[i] else pixels
        assert np.abs(got[i] - expected).max() <= 3  # two JPEG decoders differ by a little
        assert np.abs(got[i] - expected).mean() < 0.5


def test_evaluation_resizes_the_whole_image_and_changes_nothing_else() -> None:
    image = jpeg_bytes(1, 70, 50)
    got = run_pipeline([image], no_augmentation(1), train=False)[0]
    pixels = np.asarray(Image.open(io.BytesIO(image)), np.float64)
    rows, columns = triangular_weights(50, 0, 50, SIZE), triangular_weights(70, 0, 70, SIZE)
    expected = np.einsum("ih,hwc,jw->ijc", rows, pixels, columns)
    assert np.abs(got - expected).mean() < 1.0


@pytest.mark.parametrize("region", [(0, 0, 40), (3, 5, 32), (8, 8, 32), (8, 0, 31)])
@pytest.mark.parametrize("size", [(97, 140), (20, 31), (40, 40)])
def test_the_resize_is_torchvisions_antialiased_rounded(size: tuple[int, int], region: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = resize(torch.from_numpy(pixels).permute(2, 0, 1).double(), [40, 40], antialias=True)
    y, x, side = region
    full = np.array(size, np.int32)
    start, length = np.array([y, x]) / 40 * full, np.full(2, side) / 40 * full
    begin = np.maximum(start - full / 40 - 2, 0).astype(np.int32)
    end = np.ceil(start + length + full / 40 + 2).astype(int)
    out = np.empty((side, side, 3), np.uint8)
    part = np.ascontiguousarray(pixels[begin[0] : end[0], begin[1] : end[1]])
    resize_region(part, begin, full, start, length, out)
    difference = out - expected.permute(1, 2, 0).numpy()[y : y + side, x : x + side]
    assert np.abs(difference).max() < 0.501


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_region_of_a_turned_image_is_the_region_of_the_upright_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    smooth_image(3, 90, 60).save(file, "JPEG", quality=95, exif=exif)
    upright = io.BytesIO()
    ImageOps.exif_transpose(Image.open(file)).save(upright, "PNG")
    augmentation = some_augmentation(4)
    got = run_pipeline([file.getvalue()] * 4, augmentation)
    expected = run_pipeline([upright.getvalue()] * 4, augmentation)
    assert np.abs(got - expected).mean() < 0.5


def test_the_same_pixels_whatever_the_batch_and_the_threads() -> None:
    images = [jpeg_bytes(i) for i in range(8)]
    augmentation = some_augmentation(8)
    whole = run_pipeline(images, augmentation)
    for i in range(8):
        fields = {name: values[i : i + 1] for name, values in vars(augmentation).items()}
        assert (run_pipeline(images[i : i + 1], Augmentation(**fields))[0] == whole[i]).all()


def test_crop_flip_and_jitter_are_distributed_as_in_the_paper() -> None:
    config = DataConfig()
    samples = np.arange(20_000)
    drawn = draw_augmentation(config, 0, np.zeros_like(samples), samples)
    counts = np.bincount(drawn.crop[:, 0], minlength=33)
    assert len(counts) == 33 and counts.min() > 0.8 * 20_000 / 33 and counts.max() < 1.2 * 20_000 / 33
    assert abs(np.corrcoef(drawn.crop[:, 0], drawn.crop[:, 1])[0, 1]) < 0.03
    assert abs(drawn.flip.mean() - 0.5) < 0.02
    for factor in (drawn.brightness, drawn.contrast, drawn.saturation):
        assert 0.9 <= factor.min() < 0.901 and 1.099 < factor.max() <= 1.1
        assert abs(factor.mean() - 1) < 0.002 and abs(factor.std() - 0.2 / 12**0.5) < 0.002
    assert -0.1 <= drawn.hue.min() < -0.099 and 0.099 < drawn.hue.max() <= 0.1
    rows = [
        vars(draw_augmentation(config, seed, np.full(3, epoch), np.arange(3))) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({row["hue"].tobytes() for row in rows}) == 4


@pytest.mark.parametrize("content", [b"not an image", b"", jpeg_bytes(0)[:100]])
def test_an_undecodable_image_raises_a_runtime_error(content: bytes) -> None:
    with pytest.raises(RuntimeError):
        run_pipeline([jpeg_bytes(0), content], some_augmentation(2))
