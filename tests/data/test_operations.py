"""RandAugment, TrivialAugment, blur and erasing, in both forms, against torchvision's own with the same parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from dist_train.config import DataConfig
from dist_train.data import operations as compiled_form
from dist_train.data import operations_torch as torch_form
from dist_train.data.augment import Augmentation, blur_kernels, draw_augmentation
from dist_train.data.auto_augment import BINS, Operation, affine_maps, magnitude_table
from tests.data.test_colour import odd_images

NAMES = {
    Operation.IDENTITY: "Identity",
    Operation.SHEAR_X: "ShearX",
    Operation.SHEAR_Y: "ShearY",
    Operation.TRANSLATE_X: "TranslateX",
    Operation.TRANSLATE_Y: "TranslateY",
    Operation.ROTATE: "Rotate",
    Operation.BRIGHTNESS: "Brightness",
    Operation.COLOR: "Color",
    Operation.CONTRAST: "Contrast",
    Operation.SHARPNESS: "Sharpness",
    Operation.POSTERIZE: "Posterize",
    Operation.SOLARIZE: "Solarize",
    Operation.AUTOCONTRAST: "AutoContrast",
    Operation.EQUALIZE: "Equalize",
}
POLICIES = {"randaugment": v2.RandAugment(), "trivialaugment": v2.TrivialAugmentWide()}
MOVES = range(Operation.SHEAR_X, Operation.ROTATE + 1)
Apply = Callable[..., NDArray[np.uint8]]


def by_compiled(pixels: NDArray[np.uint8], *parameters: NDArray) -> NDArray[np.uint8]:
    out = pixels.copy()
    compiled_form.apply_operations(out, *parameters)
    return out


def by_torch(pixels: NDArray[np.uint8], *parameters: NDArray) -> NDArray[np.uint8]:
    return torch_form.apply_operations(torch.from_numpy(pixels), *parameters).numpy()


def operate(apply: Apply, images: NDArray[np.uint8], operations: NDArray, magnitudes: NDArray) -> NDArray[np.uint8]:
    """(B, S, S, 3) after (B, n) operations, none of them flipped."""
    maps = affine_maps(operations, magnitudes, images.shape[1])
    return apply(images, np.zeros(len(images), bool), operations, magnitudes, maps)


def torchvisions(policy: str, image: NDArray[np.uint8], operation: int, magnitude: float) -> NDArray[np.uint8]:
    """What torchvision's own dispatcher makes of an image (S, S, 3) of whole numbers."""
    planes = torch.from_numpy(image).permute(2, 0, 1)
    made = POLICIES[policy]._apply_image_or_video_transform(
        planes, NAMES[Operation(operation)], magnitude, interpolation="nearest", fill={torch.Tensor: None}
    )
    return made.permute(1, 2, 0).numpy()


def to_the_last_bit(policy: str, image: np.ndarray, operation: int, magnitude: float) -> list[np.ndarray]:
    """The same, and beside it for a shear and a turn what it makes of magnitudes that are hardly others. Which of two
    pixels a point half-way between them takes hangs on the last bit of its place. Ours has the product by y fused; in
    torchvision a library multiplies matrices, which fuses it on some processors and not on others."""
    hardly = (1, 1 + 1e-5, 1 - 1e-5) if operation in (Operation.SHEAR_X, Operation.SHEAR_Y, Operation.ROTATE) else (1,)
    return [torchvisions(policy, image, operation, factor * magnitude) for factor in hardly]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("side", [16, 96, 128, 224, 225])
def test_operations_and_magnitudes_are_torchvisions(policy: str, side: int) -> None:
    space = POLICIES[policy]._AUGMENTATION_SPACE
    assert list(space) == list(NAMES.values())
    table = magnitude_table(policy, side)  # type: ignore[arg-type]
    for operation, name in NAMES.items():
        values, signed = space[name]
        expected = values(BINS, side, side)
        expected = np.zeros(BINS) if expected is None else expected.double().numpy()
        if "Translate" in name:  # in whole pixels, so that a last bit counts
            assert (table[operation] == np.trunc(expected)).all(), name
        else:
            np.testing.assert_allclose(table[operation], expected, 1e-6, err_msg=name)
        assert signed == (Operation.SHEAR_X <= operation <= Operation.SHARPNESS)


@pytest.mark.parametrize("apply", [by_compiled, by_torch])
@pytest.mark.parametrize("operation", NAMES)
def test_each_operation_is_torchvisions_at_every_magnitude(apply: Apply, operation: Operation) -> None:
    """Within 1 of 255, which is how far cutting to whole numbers can be off; those that only move pixels, exactly."""
    some = odd_images()[1::3]
    for policy in POLICIES:
        signs = (1, -1) if Operation.SHEAR_X <= operation <= Operation.SHARPNESS else (1,)
        values = [sign * value for value in magnitude_table(policy, len(some[0]))[operation] for sign in signs]  # type: ignore[arg-type]
        images = np.stack([some[i % len(some)] for i in range(len(values))])
        kinds, magnitudes = np.full((len(values), 1), operation, np.int64), np.array(values)[:, None]
        got = operate(apply, images, kinds, magnitudes)
        differences = np.stack(
            [
                np.min(
                    [abs(result.astype(int) - one) for one in to_the_last_bit(policy, image, operation, value)], axis=0
                )
                for image, value, result in zip(images, values, got, strict=True)
            ]
        )
        assert differences.max() <= (0 if operation in MOVES else 1), (policy, differences.max())
        assert (differences > 0).mean() < 0.01
        if operation in MOVES:
            pairs = zip(images, values, strict=True)
            exact = np.stack([torchvisions(policy, image, operation, value) for image, value in pairs])
            assert (got != exact).mean() < 1e-3, "half-way points are few"


@pytest.mark.parametrize("apply", [by_compiled, by_torch])
def test_an_image_is_flipped_first_and_then_has_its_operations_one_after_the_other(apply: Apply) -> None:
    images = np.stack(odd_images()[-6:])
    kinds = np.array([[Operation.ROTATE, Operation.COLOR, Operation.SHEAR_X]] * len(images))
    magnitudes = np.array([[20.0, 0.5, -0.2]] * len(images))
    flip = np.arange(len(images)) % 2 == 0
    got = apply(images, flip, kinds, magnitudes, affine_maps(kinds, magnitudes, images.shape[1]))
    for image, flipped, result in zip(images, flip, got, strict=True):
        expected = [image[:, ::-1].copy() if flipped else image]
        for step in zip(kinds[0], magnitudes[0], strict=True):
            expected = [made for one in expected for made in to_the_last_bit("randaugment", one, *step)]
        assert np.min([abs(result.astype(int) - one) for one in expected], axis=0).max() <= 1


def drawn(count: int, side: int, **settings: object) -> Augmentation:
    config = DataConfig(image_size=side, **settings)  # type: ignore[arg-type]
    return draw_augmentation(config, 1, np.zeros(count, np.int64), np.arange(count))


@pytest.mark.parametrize("policy", POLICIES)
def test_both_forms_give_the_same_pixels_alone_or_in_a_batch(policy: str) -> None:
    images = np.stack(odd_images() * 4)
    chosen = drawn(len(images), images.shape[1], auto_augment=policy, randaugment_ops=3, randaugment_magnitude=17)
    maps = affine_maps(chosen.operations, chosen.magnitudes, images.shape[1])
    parameters = (chosen.flip, chosen.operations, chosen.magnitudes, maps)
    together, by_operators = by_compiled(images, *parameters), by_torch(images, *parameters)
    assert (together == by_operators).all()
    for i in range(0, len(images), 7):
        one = [values[i : i + 1] for values in (images, *parameters)]
        assert (by_torch(*one)[0] == together[i]).all() and (by_compiled(*one)[0] == together[i]).all()


def test_operations_signs_and_magnitudes_are_drawn_evenly() -> None:
    chosen = drawn(30_000, 96, auto_augment="trivialaugment")
    counts = np.bincount(chosen.operations.ravel(), minlength=len(NAMES))
    assert counts.min() > 0.9 * counts.mean() and counts.max() < 1.1 * counts.mean()
    rotations = chosen.magnitudes[chosen.operations == Operation.ROTATE]
    assert len(np.unique(np.abs(rotations))) == BINS and abs(np.sign(rotations).mean()) < 0.06
    two = drawn(30_000, 96, auto_augment="randaugment")
    assert two.operations.shape == (30_000, 2)
    assert abs(np.corrcoef(two.operations[:, 0], two.operations[:, 1])[0, 1]) < 0.02
    assert set(np.abs(two.magnitudes[two.operations == Operation.BRIGHTNESS])) == {
        magnitude_table("randaugment", 96)[Operation.BRIGHTNESS, 9]
    }


# ---------------------------------------------------------------- blur and erasing
def blurred_and_erased(form: str, images: NDArray[np.float32], sigma: NDArray, erased: NDArray) -> NDArray[np.float32]:
    out = images.copy()
    parameters = (sigma > 0, blur_kernels(np.where(sigma > 0, sigma, 1)), erased)
    if form == "compiled":
        compiled_form.blur_and_erase(out, *parameters)
        return out
    tensor = torch.from_numpy(out)
    torch_form.blur_and_erase(tensor, *parameters)
    return tensor.numpy()


@pytest.mark.parametrize("form", ["compiled", "torch"])
def test_blur_is_torchvisions_and_erasing_puts_zeros_into_the_box_alone(form: str) -> None:
    pixels = np.stack(odd_images())
    images = (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32)
    count, side = len(images), images.shape[2]
    chosen = drawn(count, side, blur=0.7, erasing=0.7)
    assert 0 < (chosen.blur == 0).sum() < count and 0 < (chosen.erased[:, 2] == 0).sum() < count
    got = blurred_and_erased(form, images, chosen.blur, chosen.erased)
    for i in range(count):
        expected = torch.from_numpy(images[i]).double()
        whole = torch.from_numpy(pixels[i]).permute(2, 0, 1)
        if chosen.blur[i]:
            expected = functional.gaussian_blur(expected, [9, 9], [chosen.blur[i]] * 2)
            whole = functional.gaussian_blur(whole, [9, 9], [chosen.blur[i]] * 2)
        y, x, height, width = chosen.erased[i].tolist()
        expected = functional.erase(expected, y, x, height, width, torch.zeros(1, dtype=torch.float64))
        assert np.abs(got[i] - expected.numpy()).max() < 1e-5
        kept = np.ones((side, side), bool)
        kept[y : y + height, x : x + width] = False
        assert np.abs(127.5 * (got[i] + 1) - whole.numpy())[:, kept].max() < 0.51  # it rounds
        assert (got[i][:, ~kept] == 0).all()


def test_a_blur_does_not_depend_on_what_is_beside_it_in_the_batch() -> None:
    images = np.random.default_rng(0).normal(size=(6, 3, 40, 40)).astype(np.float32)
    sigma, nothing = np.array([0.5, 0, 1, 2, 0, 0.1]), np.zeros((6, 4), np.int32)
    for form in ("compiled", "torch"):
        together = blurred_and_erased(form, images, sigma, nothing)
        for i in range(6):
            one = slice(i, i + 1)
            assert (blurred_and_erased(form, images[one], sigma[one], nothing[one])[0] == together[i]).all()


def test_boxes_are_erased_as_often_and_as_large_as_torchvisions() -> None:
    chosen = drawn(20_000, 96, erasing=0.25)
    height, width = chosen.erased[:, 2].astype(float), chosen.erased[:, 3].astype(float)
    some = height > 0
    assert abs(some.mean() - 0.25) < 0.01
    area, aspect = (height * width)[some] / 96**2, (height[some] / width[some])
    assert 0.017 < area.min() and area.max() < 0.34 and abs(area.mean() - 0.17) < 0.01
    assert 0.25 < aspect.min() and aspect.max() < 4 and abs(np.log(aspect).mean()) < 0.05
    assert (chosen.erased[:, 0] + height <= 96).all() and (chosen.erased[:, 1] + width <= 96).all()
    reference = v2.RandomErasing()
    torch.manual_seed(0)
    theirs = [reference.make_params([torch.empty(3, 96, 96)]) for _ in range(2000)]
    assert abs(np.mean([box["h"] * box["w"] for box in theirs]) / 96**2 - area.mean()) < 0.01
    assert abs(np.mean([math.log(box["h"] / box["w"]) for box in theirs]) - np.log(aspect).mean()) < 0.07


def test_new_numbers_leave_those_of_crop_flip_and_jitter_as_they_are() -> None:
    plain = drawn(50, 96)
    more = drawn(50, 96, auto_augment="randaugment", erasing=0.5, blur=0.5, grey=0.5, crop_scale=(0.2, 0.3))
    for name in ("crop", "flip", "brightness", "contrast"):
        assert (getattr(plain, name) == getattr(more, name)).all()
    grey = more.saturation == 0
    assert 10 < grey.sum() < 40 and (more.hue[grey] == 0).all()
    assert (more.saturation == plain.saturation)[~grey].all() and (more.hue == plain.hue)[~grey].all()
