"""The DALI graph: encoded images in, normalised float tensors (3, S, S) out, on the CPU or the GPU.

Where to crop, whether to flip and how to change the colours come in as per-sample arguments (`augment.py`); DALI's own
random generators are not used. Crop and resize are one step: cutting image_size of (image_size + crop_margin) from the
resized square is the same as resizing that share of the original. Images baked to that square are cut without any
resampling, and then only the region is decoded.

The colour change is the cost on a CPU, so there it is one Numba pass with normalisation, flip and HWC -> CHW inside the
pipeline; the GPU runs DALI's `color_twist` and `crop_mirror_normalize`, which compute the same map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.plugin.numba.fn.experimental import numba_function

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, colour_maps


class ImagePipeline:
    """Decodes and augments batches given in order; keeps up to `depth` of them under way.

    train: random crop, flip and colour, else a plain resize. baked: side in pixels of the square that every image of
    the set was resized to, or None. device_id: the GPU, or None for the CPU. depth: batches under way; there must be at
    least that many in all. Use: `feed` a batch `depth` times, then alternate `take` and `feed`.
    A batch with an undecodable image makes DALI raise RuntimeError in `feed` or `take`; the object is then unusable.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        train: bool,
        baked: int | None,
        batch_size: int,
        threads: int,
        device_id: int | None,
        depth: int,
    ) -> None:
        self.train = train
        self._cut_only = baked == config.image_size + config.crop_margin
        self.device_id = device_id
        self.depth = depth
        self._fed = 0
        graph = _graph(config, train, baked, device_id is not None)
        self._pipeline: Pipeline = pipeline_def(
            graph, batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=depth
        )()
        self._pipeline.build()

    def feed(self, images: list[NDArray[np.uint8]], augmentation: Augmentation) -> None:
        """Hand in one batch: encoded images, which must stay unchanged until taken, and their parameters."""
        inputs: dict[str, Any] = {"images": images}
        if self.train:
            inputs["crop"] = augmentation.crop if self._cut_only else augmentation.crop.astype(np.float32)
        if self.device_id is None:
            maps = colour_maps(augmentation).reshape(len(images), 12)
            inputs["colour"] = np.column_stack([maps, augmentation.flip.astype(np.float32)])
        else:
            for name in ("brightness", "contrast", "saturation"):
                inputs[name] = getattr(augmentation, name).astype(np.float32)
            inputs["hue"] = (360 * augmentation.hue).astype(np.float32)
            inputs["flip"] = augmentation.flip.astype(np.int32)
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)
        self._fed += 1
        if self._fed >= self.depth:  # DALI's first schedule_run starts `depth` batches at once
            self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The oldest batch under way: (B, 3, S, S) float32 on the pipeline's device, the caller's to keep."""
        stream = None if self.device_id is None else torch.cuda.current_stream(self.device_id)
        (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        tensor = torch.from_dlpack(output.as_tensor())
        self._pipeline.release_outputs()  # DALI reuses the memory only when the tensor is gone
        return tensor


def _graph(config: DataConfig, train: bool, baked: int | None, gpu: bool) -> Callable[[], Any]:
    size, square = config.image_size, config.image_size + config.crop_margin
    decoder_device, device = ("mixed", "gpu") if gpu else ("cpu", "cpu")
    resize = {"device": device, "size": [size, size], "interp_type": types.INTERP_TRIANGULAR}

    def graph() -> Any:
        encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1, no_copy=not gpu)
        decode = {"device": decoder_device, "output_type": types.RGB}
        if train and baked == square:
            crop = fn.external_source(name="crop", dtype=types.INT32, ndim=1)
            image = fn.decoders.image_slice(encoded, crop, [size, size], axis_names="HW", **decode)
        elif train:
            crop = fn.external_source(name="crop", dtype=types.FLOAT, ndim=1) / square
            image = fn.decoders.image(encoded, **decode)
            image = fn.resize(image, roi_start=crop, roi_end=crop + size / square, roi_relative=True, **resize)
        else:
            image = fn.decoders.image(encoded, **decode)
            image = image if baked == size else fn.resize(image, **resize)
        return _colour_on_gpu(config, image) if gpu else _colour_on_cpu(config, image)

    return graph


def _colour_on_gpu(config: DataConfig, image: Any) -> Any:
    jitter = {
        name: fn.external_source(name=name, dtype=types.FLOAT, ndim=0)
        for name in ("brightness", "contrast", "saturation", "hue")
    }
    return fn.crop_mirror_normalize(
        fn.color_twist(image, device="gpu", **jitter),
        device="gpu",
        mirror=fn.external_source(name="flip", dtype=types.INT32, ndim=0),
        mean=[255 * mean for mean in config.mean],
        std=[255 * std for std in config.std],
        output_layout="CHW",
        dtype=types.FLOAT,
    )


def _colour_on_cpu(config: DataConfig, image: Any) -> Any:
    """Affine map of the colours, clipped to [0, 255], then normalised, flipped and laid out CHW, in one pass.

    The per-sample argument "colour" holds the 12 coefficients of the map, row by row, and 1 to flip or 0.
    """
    scale_r, scale_g, scale_b = (np.float32(1 / (255 * std)) for std in config.std)
    shift_r, shift_g, shift_b = (np.float32(-mean / std) for mean, std in zip(config.mean, config.std, strict=True))
    low, high = np.float32(0), np.float32(255)

    def output_shapes(outputs: Any, inputs: Any) -> None:
        for i in range(len(outputs[0])):
            outputs[0][i][0] = 3
            outputs[0][i][1] = inputs[0][i][0]
            outputs[0][i][2] = inputs[0][i][1]

    def colour_pass(output: Any, pixels: Any, m: Any) -> None:
        height, width = pixels.shape[0], pixels.shape[1]
        first, direction = (width - 1, -1) if m[12] > 0 else (0, 1)
        for y in range(height):
            for x in range(width):
                source = first + direction * x
                r, g, b = (
                    np.float32(pixels[y, source, 0]),
                    np.float32(pixels[y, source, 1]),
                    np.float32(pixels[y, source, 2]),
                )
                output[0, y, x] = min(max(m[0] * r + m[1] * g + m[2] * b + m[3], low), high) * scale_r + shift_r
                output[1, y, x] = min(max(m[4] * r + m[5] * g + m[6] * b + m[7], low), high) * scale_g + shift_g
                output[2, y, x] = min(max(m[8] * r + m[9] * g + m[10] * b + m[11], low), high) * scale_b + shift_b

    colour = fn.external_source(name="colour", dtype=types.FLOAT, ndim=1)
    return numba_function(
        image,
        colour,
        run_fn=colour_pass,
        setup_fn=output_shapes,
        in_types=[types.UINT8, types.FLOAT],
        ins_ndim=[3, 1],
        out_types=[types.FLOAT],
        outs_ndim=[3],
        batch_processing=False,
    )
