"""The colour change, in each of its three forms, against torchvision's functions composed in the promised order."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data import colour, colour_torch
from dist_train.data.augment import Augmentation, colour_parameters, draw_augmentation, no_augmentation
from shards.demo.records import demo_records
from tests.data.torchvision_jitter import torchvisions
from tests.harness import REPOSITORY, smooth_image

SIDE = 40
SCALE, SHIFT = (1 / 255,) * 3, (0.0,) * 3  # to [0, 1], as torchvision has it
CHANGES = ("brightness", "contrast", "saturation", "hue")
INTERPRETED = """
import sys, numpy, torch
from dist_train.data.colour_triton import change_colours
cases = numpy.load(sys.argv[1])
pixels, parameters = torch.from_numpy(cases["pixels"]), torch.from_numpy(cases["parameters"])
numpy.save(sys.argv[2], change_colours(pixels, parameters, (1 / 255,) * 3, (0.0,) * 3).numpy())
"""


def compiled(pixels: NDArray[np.uint8], parameters: NDArray[np.float32]) -> NDArray[np.float32]:
    """The CPU's form: (B, 3, H, W) in [0, 1]."""
    out = np.full((len(pixels), 3, *pixels.shape[1:3]), np.nan, np.float32)
    colour.change_colours(pixels, parameters, np.float32(SCALE), np.float32(SHIFT), out)
    return out


def by_torch(pixels: NDArray[np.uint8], parameters: NDArray[np.float32]) -> NDArray[np.float32]:
    """PyTorch's operators."""
    return colour_torch.change_colours(torch.from_numpy(pixels), torch.from_numpy(parameters), SCALE, SHIFT).numpy()


def by_triton(pixels: NDArray[np.uint8], parameters: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    """The GPU's kernel in Triton's interpreter, which has to be chosen before Triton is imported."""
    np.savez(folder / "cases.npz", pixels=pixels, parameters=parameters)
    arguments = [INTERPRETED, str(folder / "cases.npz"), str(folder / "out.npy")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", *arguments], env=environment, cwd=REPOSITORY, check=True)
    return np.load(folder / "out.npy")


def odd_images() -> list[NDArray[np.uint8]]:
    """Noise, one colour all over, corners of the colour cube, equal channels, dark ones, and drawn pictures."""
    rng = np.random.default_rng(0)
    flat = [np.full((SIDE, SIDE, 3), value, np.uint8) for value in (0, 1, 128, 254, 255)]
    noise = rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    corners = 255 * rng.integers(0, 2, (2, SIDE, SIDE, 3), dtype=np.uint8)
    primaries = [np.tile(np.uint8([255 * (n >> c & 1) for c in range(3)]), (SIDE, SIDE, 1)) for n in range(1, 7)]
    grey = np.repeat(noise[0, :, :, :1], 3, axis=2)
    ties = noise[1].copy()
    ties[..., 1] = ties[..., 0]
    smooth = [np.asarray(smooth_image(n, SIDE, SIDE)) for n in range(3)]
    drawn = [np.asarray(Image.open(io.BytesIO(record.read()))) for record in demo_records(5, 20, SIDE)[::5]]
    return [*flat, *noise, *corners, *primaries, grey, ties, noise[2] // 64, *smooth, *drawn]


def jitters(count: int, strength: float, only: str | None = None) -> Augmentation:
    """Parameters from ranges of this strength (of the hue, half of it), of one change alone or of all and the flip."""
    config = DataConfig(brightness=strength, contrast=strength, saturation=strength, hue=strength / 2)
    drawn = draw_augmentation(config, 3, np.zeros(count, np.int64), np.arange(count))
    return replace(no_augmentation(count), **{only: getattr(drawn, only)}) if only else drawn


def joined(parts: list[Augmentation]) -> Augmentation:
    return Augmentation(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(parts[0])))


def check_is_torchvisions(
    change: Callable[..., NDArray[np.float32]], images: list[NDArray[np.uint8]], every: int = 1
) -> None:
    """Every change alone and all together, weak and as strong as they can be, on all images, or on each `every`th."""
    kinds = [(strength, only) for strength in (0.1, 1.0) for only in (*CHANGES, None)]
    pixels = np.stack(images * len(kinds))[::every]
    drawn = joined([jitters(len(images), *kind) for kind in kinds])
    augmentation = Augmentation(*(getattr(drawn, field.name)[::every] for field in fields(drawn)))
    got = change(pixels, colour_parameters(augmentation))
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    expected = torch.stack([torchvisions(image, augmentation, i) for i, image in enumerate(planes)]).numpy()
    assert got.shape == expected.shape
    assert 255 * np.abs(got - expected).max() < 0.01


@pytest.mark.parametrize("change", [compiled, by_torch])
def test_every_pixel_is_torchvisions(change: Callable[..., NDArray[np.float32]]) -> None:
    check_is_torchvisions(change, odd_images())


@pytest.mark.parametrize("change", [compiled, by_torch])
def test_every_pixel_of_photos_is_torchvisions(change: Callable[..., NDArray[np.float32]], shared_data: Path) -> None:
    files = sorted((shared_data / "grocery").rglob("*.jpg"))[::400]
    check_is_torchvisions(change, [np.asarray(Image.open(file).convert("RGB").resize((128, 128))) for file in files])


def test_every_pixel_of_the_gpus_kernel_is_torchvisions(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    check_is_torchvisions(lambda *arguments: by_triton(*arguments, tmp_path), odd_images(), every=3)


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_gpus_kernel_compiles_without_a_gpu(capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_train.data.colour_triton import _change_colours

    constants = {"GREY_RED": 0.3, "GREY_GREEN": 0.6, "GREY_BLUE": 0.1, "WIDTH": 96, "PIXELS": 96 * 96, "BLOCK": 1024}
    types = {name: "constexpr" if name in constants else "fp32" for name in _change_colours.arg_names}
    types |= {"pixels": "*u8", "parameters": "*fp32", "out": "*fp32"}
    built = triton.compile(ASTSource(_change_colours, types, constants), GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]


def test_where_the_kernel_cannot_be_compiled_torchs_operators_take_its_place(caplog: pytest.LogCaptureFixture) -> None:
    change = colour_torch.fastest_colour_change(torch.device("cpu"), 8)  # Triton compiles nothing for a CPU
    assert change is colour_torch.change_colours
    (warning,) = caplog.messages
    assert warning.startswith("colours are changed by PyTorch's operators") and "\n" not in warning


@pytest.mark.parametrize(
    "only, mean, highest",
    [("brightness", 1, 1), ("contrast", 1, 1.1), ("saturation", 1, 1.1), ("hue", 1, 1), (None, 2, 6)],
)
def test_results_are_near_torchvisions_of_whole_numbers(only: str | None, mean: float, highest: float) -> None:
    """Which it cuts, without rounding, after each of the four."""
    images = np.stack(odd_images()[-8:])
    augmentation = jitters(len(images), 0.1, only)
    got = compiled(images, colour_parameters(augmentation))
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    expected = torch.stack([torchvisions(image, augmentation, i) for i, image in enumerate(planes)]).numpy()
    differences = np.abs(255 * got - expected)
    assert differences.mean() < mean and differences.max() < highest


small_images = arrays(np.uint8, st.tuples(st.just(1), st.integers(1, 9), st.integers(1, 9), st.just(3)))
any_parameters = st.tuples(*[st.floats(0, 2, width=32)] * 3, st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0]))


@pytest.mark.parametrize("change", [compiled, by_torch])
@given(pixels=small_images, flip=st.booleans())
def test_parameters_that_change_nothing_give_the_image(
    change: Callable[..., NDArray[np.float32]], pixels: NDArray[np.uint8], flip: bool
) -> None:
    got = change(pixels, np.float32([[1, 1, 1, 0, flip]]))
    expected = pixels[:, :, ::-1] if flip else pixels
    assert (got == (expected.astype(np.float32) * np.float32(1 / 255)).transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize("change", [compiled, by_torch])
@given(pixels=small_images, parameters=any_parameters)
def test_grey_images_stay_grey(
    change: Callable[..., NDArray[np.float32]], pixels: NDArray[np.uint8], parameters: tuple[float, ...]
) -> None:
    got = change(np.repeat(pixels[..., :1], 3, axis=3), np.float32([parameters]))
    assert np.abs(got - got[:, :1]).max() < 1e-6


@pytest.mark.parametrize("change", [compiled, by_torch])
@given(pixels=small_images, parameters=any_parameters)
def test_whatever_the_parameters_pixels_keep_their_range(
    change: Callable[..., NDArray[np.float32]], pixels: NDArray[np.uint8], parameters: tuple[float, ...]
) -> None:
    got = change(pixels, np.float32([parameters]))
    assert got.min() >= 0 and got.max() <= 1 + 1e-6


@given(pixels=small_images, parameters=any_parameters)
def test_any_parameters_mean_on_the_cpu_what_they_mean_to_torch(
    pixels: NDArray[np.uint8], parameters: tuple[float, ...]
) -> None:
    of_cpu, of_torch = (change(pixels, np.float32([parameters])) for change in (compiled, by_torch))
    assert 255 * np.abs(of_cpu - of_torch).max() < 0.01


def test_a_positive_hue_turns_red_towards_yellow() -> None:
    red, green, blue = compiled(np.uint8([[[[200, 60, 60]]]]), np.float32([[1, 1, 1, 0.08, 0]])).ravel()
    assert red > green > blue
