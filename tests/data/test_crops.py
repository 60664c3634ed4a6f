"""RandomResizedCrop, and the centre crop of an evaluation: against torchvision, on every way that an image takes."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali.pipeline import pipeline_def
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dist_train.config import DataConfig
from dist_train.data import crops
from dist_train.data.augment import Augmentation, draw_augmentation, no_augmentation
from dist_train.data.graph import gpu_graph, region_inputs
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.pipeline import ImagePipeline
from dist_train.data.reader import ImageReader
from dist_train.place import Place
from tests.data.test_graph import photo_like
from tests.harness import jpeg_bytes, smooth_image, write_raw_set

SIDE = 32
STILL = {"flip": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
RESIZED = DataConfig(image_size=SIDE, crop="random_resized", **STILL)  # type: ignore[arg-type]
CENTRE = DataConfig(image_size=SIDE, eval_crop="center", eval_crop_pct=0.8)
SIZES = [(48, 40), (100, 61), (33, 90), (40, 40), (20, 24), (200, 160), (300, 20), (7, 150)]  # width, height


def decoded(image: NDArray[np.uint8]) -> torch.Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(image.tobytes())).convert("RGB"))).permute(2, 0, 1)


def heights_and_widths(sizes: list[tuple[int, int]]) -> NDArray[np.int32]:
    return np.array(sizes, np.int32)[:, ::-1]


def draw(config: DataConfig, sizes: list[tuple[int, int]]) -> Augmentation:
    samples = np.arange(len(sizes))
    return draw_augmentation(config, 3, np.zeros_like(samples), samples, heights_and_widths(sizes))


def of_cpu(
    images: list[NDArray[np.uint8]],
    sizes: list[tuple[int, int]],
    augmentation: Augmentation,
    config: DataConfig,
    train: bool,
) -> NDArray[np.float64]:
    """What the CPU's pipeline makes of a batch, in RGB 0..255: (B, 3, S, S)."""
    pipeline = ImagePipeline(
        config, train=train, baked=None, batch_size=len(images), threads=2, device_id=None, depth=1
    )
    pipeline.feed(images, augmentation, heights_and_widths(sizes))
    pixels = pipeline.take().double().numpy()
    pipeline.close()
    return 127.5 * (pixels + 1)


def of_gpu_graph(
    images: list[NDArray[np.uint8]],
    sizes: list[tuple[int, int]],
    augmentation: Augmentation,
    config: DataConfig,
    train: bool,
) -> NDArray[np.float64]:
    """What the GPU's graph makes of it, computed by the CPU."""
    pipeline = pipeline_def(gpu_graph)(
        config, train, False, "cpu", batch_size=len(images), num_threads=1, device_id=None
    )
    regions = (
        crops.regions_of_boxes(augmentation.box)
        if train
        else crops.regions_of_centres(heights_and_widths(sizes), config.image_size, config.eval_crop_pct)
    )
    inputs: dict[str, Any] = {"images": images} | region_inputs(regions, on_gpu=True)
    for name, values in inputs.items():
        pipeline.feed_input(name, values)
    (output,) = pipeline.run()
    return np.asarray(output.as_tensor()).astype(np.float64).transpose(0, 3, 1, 2)


Make = Callable[..., NDArray[np.float64]]
# Of the CPU rounding alone. DALI repeats the outermost pixels where torchvision leaves out what is beyond them.
WAYS: list[tuple[Make, float, float]] = [(of_cpu, 0.51, 0.51), (of_gpu_graph, 1.0, 4.0)]


def check(got: NDArray[np.float64], expected: torch.Tensor, inside: float, outermost: float) -> None:
    differences = np.abs(got - expected.numpy())
    assert differences[:, 1:-1, 1:-1].max() < inside
    assert differences.max() < outermost and differences.mean() < 0.3


@pytest.mark.parametrize("make, inside, outermost", WAYS)
def test_a_random_resized_crop_is_torchvisions_of_the_same_box(make: Make, inside: float, outermost: float) -> None:
    sizes = SIZES * 3
    images = [photo_like(i, *size) for i, size in enumerate(sizes)]
    augmentation = draw(RESIZED, sizes)
    got = make(images, sizes, augmentation, RESIZED, True)
    for image, box, result in zip(images, augmentation.box.tolist(), got, strict=True):
        expected = functional.resized_crop(decoded(image).double(), *box, [SIDE, SIDE], antialias=True)
        check(result, expected, inside, outermost)


@pytest.mark.parametrize("make, inside, outermost", WAYS)
@pytest.mark.parametrize("share", [0.8, 1.0])
def test_the_centre_of_an_evaluation_is_torchvisions(make: Make, inside: float, outermost: float, share: float) -> None:
    config = replace(CENTRE, eval_crop_pct=share)
    images = [photo_like(i, *size) for i, size in enumerate(SIZES)]
    got = make(images, SIZES, no_augmentation(len(images)), config, False)
    for image, result in zip(images, got, strict=True):
        resized = functional.resize(decoded(image).double(), [int(SIDE / share)], antialias=True)
        expected = functional.center_crop(resized, [SIDE, SIDE])
        check(result, expected, inside, outermost)


def test_the_centre_is_timms_evaluation_too() -> None:
    transform = create_transform(SIDE, crop_pct=0.8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    images = [photo_like(i, *size) for i, size in enumerate(SIZES)]
    got = of_cpu(images, SIZES, no_augmentation(len(images)), CENTRE, False)
    for image, result in zip(images, got, strict=True):
        expected = 127.5 * (transform(Image.open(io.BytesIO(image.tobytes()))) + 1)
        assert np.abs(result - expected.numpy()).max() < 2  # Pillow rounds between its two passes


def test_the_region_of_a_jpeg_is_that_of_the_whole() -> None:
    """Halved colour planes are enlarged beyond the edge of what is decoded."""
    sizes = [(160, 120), (161, 97)] * 4
    images = [np.frombuffer(jpeg_bytes(i, *size), np.uint8) for i, size in enumerate(sizes)]
    config = replace(RESIZED, crop_scale=(0.08, 0.3))
    augmentation = draw(config, sizes)
    got = of_cpu(images, sizes, augmentation, config, True)
    for image, box, result in zip(images, augmentation.box.tolist(), got, strict=True):
        expected = functional.resized_crop(decoded(image).double(), *box, [SIDE, SIDE], antialias=True)
        assert np.abs(result - expected.numpy()).mean() < 0.6
        assert np.abs(result - expected.numpy()).max() < 4


def test_photos_are_within_the_tolerance(shared_data: Path) -> None:
    files = sorted((shared_data / "grocery").rglob("*.jpg"))[::400]
    images = [np.frombuffer(file.read_bytes(), np.uint8) for file in files]
    sizes = [Image.open(file).size for file in files]
    augmentation = draw(RESIZED, sizes)
    got = of_cpu(images, sizes, augmentation, RESIZED, True)
    for image, box, result in zip(images, augmentation.box.tolist(), got, strict=True):
        expected = functional.resized_crop(decoded(image), *box, [SIDE, SIDE], antialias=True)
        assert np.abs(result - expected.numpy()).mean() < 1.5


def test_boxes_are_distributed_as_torchvisions() -> None:
    config = DataConfig(crop="random_resized")
    for width, height in ((200, 150), (64, 300)):
        count = 20_000
        boxes = draw(config, [(width, height)] * count).box.astype(float)
        reference, image = v2.RandomResizedCrop(SIDE), torch.empty(3, height, width)
        torch.manual_seed(0)
        theirs = [reference.make_params([image]) for _ in range(4000)]
        expected = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in theirs], float)
        for ours, his in zip(boxes.T, expected.T, strict=True):
            assert abs(ours.mean() - his.mean()) < 4 * his.std() / len(his) ** 0.5 + 1e-9
            assert abs(ours.std() - his.std()) < 0.05 * his.std() + 1e-9
        assert (boxes[:, 0] + boxes[:, 2] <= height).all() and (boxes[:, 1] + boxes[:, 3] <= width).all()
        assert boxes.min() >= 0 and boxes[:, 2:].min() >= 1


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (50, 50), (80, 50)])
def test_where_no_try_fits_the_box_is_torchvisions_in_the_middle(size: tuple[int, int]) -> None:
    scale, ratio = (1.0, 1.0), (1.2, 1.3)  # all of the area, in an aspect that none of these has
    width, height = size
    expected = v2.RandomResizedCrop(SIDE, scale, ratio).make_params([torch.empty(3, height, width)])
    box = crops.resized_crops(np.random.rand(crops.NUMBERS, 1), np.array([[height, width]], np.int32), scale, ratio)
    assert box.tolist() == [[expected[key] for key in ("top", "left", "height", "width")]]


@pytest.mark.parametrize("orientation", [1, 6])
def test_evaluation_and_prediction_see_the_centre_of_plain_turned_and_odd_images(
    tmp_path: Path, orientation: int
) -> None:
    picture, exif, file = smooth_image(3, 90, 60), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    turned, png, gif = file.getvalue(), io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG")
    picture.convert("P").save(gif, "GIF")
    files = [turned, png.getvalue(), b"not an image", gif.getvalue()]
    config = replace(CENTRE, shards=str(write_raw_set(tmp_path / "set", files)), threads=2)
    (batch,) = list(EvalLoader(config, read_manifest(config.shards), "train", Place(), batch_size=4))
    assert batch.weights.tolist() == [1, 1, 0, 1]
    reader = ImageReader(config, None)
    upright = picture.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else picture
    for i, (one, tolerance) in {0: (upright, 3), 1: (picture, 0.51), 3: (Image.open(gif).convert("RGB"), 0.51)}.items():
        whole = torch.from_numpy(np.array(one)).permute(2, 0, 1).double()
        expected = functional.center_crop(functional.resize(whole, [40], antialias=True), [SIDE, SIDE])
        assert (127.5 * (batch.images[i].double() + 1) - expected).abs().max() < tolerance
        assert (reader.read(files[i])[0] == batch.images[i]).all()
    reader.close()
