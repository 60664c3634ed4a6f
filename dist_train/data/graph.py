"""The DALI graphs: what DALI makes of a batch, on the CPU and on the GPU.

On a CPU DALI's resize and colour operators cost more than the decoding, so there DALI only decodes, and of a training
image only the region that is needed; compiled passes (`resize.py`, `colour.py`) do the rest. The GPU's graph decodes
and resizes with DALI's own operators, which compute the same. The colours are changed after it (`colour_triton.py`):
DALI has no operator for torchvision's jitter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, needs_sizes
from dist_train.data.crops import Regions


def crop_input(augmentation: Augmentation, cut_only: bool) -> NDArray[Any]:
    """What both graphs take as `crop` in training: (B, 2) (y, x), whole pixels to cut at, else offsets to scale."""
    return np.ascontiguousarray(augmentation.crop, np.int32 if cut_only else np.float32)


def region_inputs(regions: Regions, on_gpu: bool) -> dict[str, NDArray[Any]]:
    """What the graphs take of regions, (B, 2) each: the part to cut out, and for the GPU's what of it is resized."""
    inputs: dict[str, NDArray[Any]] = {"begin": regions.begin, "extent": regions.extent}
    if on_gpu:
        start = regions.start - regions.origin
        inputs |= {"start": start.astype(np.float32), "end": (start + regions.length).astype(np.float32)}
    return inputs


def cpu_graph(config: DataConfig, train: bool, cut_only: bool) -> Any:
    """Decoded pixels, (H, W, 3) uint8: cut to size if `cut_only`, else of what the resize of a region reads, together
    with where that begins and the size of the whole image; without `train` the whole image. Where the region depends on
    the image's size, it is an input, and only what it reads is decoded."""
    size, square = config.image_size, config.image_size + config.crop_margin
    encoded = _encoded()
    if needs_sizes(config, train):
        begin, extent = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("begin", "extent"))
        return fn.decoders.image_slice(encoded, begin, extent, axis_names="HW", output_type=types.RGB)
    if not train:
        return fn.decoders.image(encoded, output_type=types.RGB)
    if cut_only:
        crop = fn.external_source(name="crop", dtype=types.INT32, ndim=1)
        return fn.decoders.image_slice(encoded, crop, [size, size], axis_names="HW", output_type=types.RGB)
    crop = fn.external_source(name="crop", dtype=types.FLOAT, ndim=1) / square
    full = fn.cast(fn.slice(fn.peek_image_shape(encoded), [0], [2], axes=[0]), dtype=types.FLOAT)
    reach = math.floor(full / square) + 2  # the resize reads at most an output pixel and a half beyond the region
    begin = math.max(math.floor(crop * full) - reach, 0.0)
    end = math.min(math.ceil((crop + size / square) * full) + reach, full)
    begin, extent = (fn.cast(value, dtype=types.INT32) for value in (begin, end - begin))
    image = fn.decoders.image_slice(encoded, begin, extent, axis_names="HW", output_type=types.RGB)
    return image, begin, fn.cast(full, dtype=types.INT32)


def gpu_graph(config: DataConfig, train: bool, cut_only: bool, device: str = "gpu") -> Any:
    """Images of the right size, (S, S, 3) uint8. device: "cpu" builds the same of CPU operators, to look at its pixels.

    Images are decoded whole, also where they are only cut: a region alone would be decoded by the host, at half the
    rate on an H100. The halved colour planes of JPEGs are blended as on the CPU.
    """
    size, square = config.image_size, config.image_size + config.crop_margin
    decoder = "mixed" if device == "gpu" else "cpu"
    image = fn.decoders.image(_encoded(), device=decoder, output_type=types.RGB, jpeg_fancy_upsampling=True)
    if needs_sizes(config, train):
        begin, extent = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("begin", "extent"))
        start, end = (fn.external_source(name=name, dtype=types.FLOAT, ndim=1) for name in ("start", "end"))
        image = fn.slice(image, start=begin, shape=extent, axis_names="HW", device=device)
        interpolation = types.INTERP_TRIANGULAR
        return fn.resize(
            image, device=device, size=[size, size], interp_type=interpolation, roi_start=start, roi_end=end
        )
    if cut_only:  # in evaluation all there is: no other operator then says that the batch is one tensor
        crop = fn.external_source(name="crop", dtype=types.INT32, ndim=1) if train else [0, 0]
        return fn.slice(image, start=crop, shape=[size, size], axis_names="HW", device=device)
    resize: dict[str, Any] = {"device": device, "size": [size, size], "interp_type": types.INTERP_TRIANGULAR}
    if train:
        crop = fn.external_source(name="crop", dtype=types.FLOAT, ndim=1) / square
        resize |= {"roi_start": crop, "roi_end": crop + size / square, "roi_relative": True}
    return fn.resize(image, **resize)


def _encoded() -> Any:
    return fn.external_source(name="images", dtype=types.UINT8, ndim=1, no_copy=True)
