"""The operations of RandAugment, blur and erasing by PyTorch's operators, on any device: the same as `operations.py`.

Images with the same operation are done together, those that differ only by a table or by an affine map too. Each image
is computed by itself, so who is beside it in the batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.data.augment import GREY
from dist_train.data.auto_augment import Operation

_MOVES = (Operation.SHEAR_X, Operation.SHEAR_Y, Operation.TRANSLATE_X, Operation.TRANSLATE_Y, Operation.ROTATE)


def apply_operations(
    pixels: Tensor,
    flip: NDArray[np.bool_],
    operations: NDArray[np.int64],
    magnitudes: NDArray[np.float64],
    maps: NDArray[np.float32],
) -> Tensor:
    """The images (B, S, S, 3) uint8 flipped and after their operations; parameters as in `operations.py`."""
    flipped = _to_device(flip, pixels)[:, None, None, None]
    pixels = torch.where(flipped, pixels.flip(2), pixels)
    for k in range(operations.shape[1]):
        kinds, before = np.where(np.isin(operations[:, k], _MOVES), Operation.SHEAR_X, operations[:, k]), pixels
        pixels = before.clone()
        for kind in np.unique(kinds).tolist():
            if kind == Operation.IDENTITY:
                continue
            chosen = np.flatnonzero(kinds == kind)
            if kind == Operation.SHEAR_X:
                chosen = chosen[magnitudes[chosen, k] != 0]
            if len(chosen):
                places = _to_device(chosen, pixels)
                parameters = maps[chosen, k] if kind == Operation.SHEAR_X else magnitudes[chosen, k]
                pixels[places] = _OPERATIONS[kind](before[places], _to_device(parameters, pixels))
    return pixels


def blur_and_erase(
    images: Tensor, blurred: NDArray[np.bool_], kernels: NDArray[np.float32], erased: NDArray[np.int32]
) -> None:
    """Blur some of the images (B, 3, S, S) and erase their boxes, in place; parameters as in `operations.py`."""
    side, chosen = images.shape[-1], np.flatnonzero(blurred)
    if len(chosen):
        places, weights = _to_device(chosen, images), _to_device(kernels[chosen], images)
        reach = weights.shape[1] // 2
        some = torch.nn.functional.pad(images[places], [reach] * 4, mode="reflect")
        # Sums of slices: convolutions choose their algorithm, and so their last bits, by the size of the batch.
        for axis in (2, 3):
            slices = (weights[:, k, None, None, None] * some.narrow(axis, k, side) for k in range(2 * reach + 1))
            total = next(slices)
            for part in slices:
                total += part
            some = total
        images[places] = some
    if erased.any():
        y, x, height, width = _to_device(erased, images).T[:, :, None]
        along = torch.arange(side, device=images.device)
        rows, columns = (y <= along) & (along < y + height), (x <= along) & (along < x + width)
        images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _to_device(values: NDArray[np.generic], like: Tensor) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


# ------------------------------------------------ the operations: of (n, S, S, 3) uint8, with (n,) parameters
def _move(images: Tensor, maps: Tensor) -> Tensor:
    """maps: (n, 6)."""
    count, side = images.shape[:2]
    along = torch.arange(side, dtype=torch.float32, device=images.device) - (side - 1) / 2
    places = []
    for row in maps.reshape(count, 2, 3, 1, 1).unbind(1):
        by_x, by_y, shift = row.unbind(1)
        across = (along * by_x).double()
        out = (along.double()[:, None] * by_y.double() + across).float() + shift
        places.append((((out + 1) * side - 1) / 2).round().long())
    columns, rows = places
    inside = (columns >= 0) & (columns < side) & (rows >= 0) & (rows < side)
    source = (rows * side + columns).where(inside, 0).reshape(count, -1, 1).expand(-1, -1, 3)
    moved = images.reshape(count, -1, 3).gather(1, source).reshape(images.shape)
    return torch.where(inside[..., None], moved, 0)


def _cut(values: Tensor) -> Tensor:
    return values.clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """(n, S, S, 1) whole numbers as float32."""
    red, green, blue = images.float().split(1, -1)
    grey = red * GREY[0]
    grey = grey + green * GREY[1]
    return (grey + blue * GREY[2]).floor()


def _factors(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1, 1, 1) factor and what is missing to 1."""
    factor = (1 + magnitudes)[:, None, None, None]
    return factor.float(), (1 - factor).float()


def _colour(images: Tensor, magnitudes: Tensor) -> Tensor:
    factor, rest = _factors(magnitudes)
    own, grey = images * factor, _grey(images) * rest
    return _cut(own + grey)


def _sharpen(images: Tensor, magnitudes: Tensor) -> Tensor:
    if images.shape[1] < 3:
        return images
    whole = images.int()
    total = sum(whole[:, y : y - 2 or None, x : x - 2 or None] for y in range(3) for x in range(3))
    here = whole[:, 1:-1, 1:-1]
    smooth = (2 * (total + 4 * here) + 13) // 26
    change = (smooth - here) * _factors(magnitudes)[1]
    sharp = images.clone()
    sharp[:, 1:-1, 1:-1] = _cut(here + change)
    return sharp


def _by_table(images: Tensor, tables: Tensor) -> Tensor:
    """tables: (n, 3 or 1, 256) uint8."""
    planes = images.permute(0, 3, 1, 2).flatten(2)
    return tables.expand(-1, 3, -1).gather(2, planes.long()).reshape(-1, 3, *images.shape[1:3]).permute(0, 2, 3, 1)


def _values(images: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=images.device)


def _brighten(images: Tensor, magnitudes: Tensor) -> Tensor:
    factor, _ = _factors(magnitudes)
    return _by_table(images, _cut(_values(images) * factor[:, 0]))


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    factor, rest = _factors(magnitudes)
    mean = _grey(images).long().sum((1, 2, 3)).double() / images[0, ..., 0].numel()
    own, grey = _values(images) * factor[:, 0], mean.float()[:, None, None] * rest[:, 0]
    return _by_table(images, _cut(own + grey))


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    mask = 256 - torch.bitwise_left_shift(torch.ones_like(magnitudes, dtype=torch.int64), 8 - magnitudes.long())
    return images & mask.to(torch.uint8)[:, None, None, None]


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    return torch.where(images >= (255 * magnitudes).float()[:, None, None, None], 255 - images, images)


def _autocontrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    low, high = (values.float() for values in (images.amin((1, 2)), images.amax((1, 2))))
    span = (high - low) * (1 / 255)
    values = _values(images).expand(*low.shape, 256)
    stretched = (values - low[..., None]) / span[..., None]
    return _by_table(images, _cut(torch.where(span[..., None] == 0, values, stretched)))


def _equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    planes = images.permute(0, 3, 1, 2).flatten(2).long()
    counts = torch.zeros(*planes.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, planes, torch.ones_like(planes))
    up_to = counts.cumsum(2)
    step = up_to[..., -1:] - counts.gather(2, planes.amax(2, keepdim=True))
    step = step // 255
    below = up_to - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table[..., 0] = 0
    return _by_table(images, torch.where(step == 0, torch.arange(256, device=images.device), table).to(torch.uint8))


_OPERATIONS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.SHEAR_X: _move,
    Operation.BRIGHTNESS: _brighten,
    Operation.COLOR: _colour,
    Operation.CONTRAST: _contrast,
    Operation.SHARPNESS: _sharpen,
    Operation.POSTERIZE: _posterize,
    Operation.SOLARIZE: _solarize,
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
}
"""SHEAR_X stands for all that move pixels."""
