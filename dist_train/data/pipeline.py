"""The DALI graph: encoded images in, normalised float tensors (3, S, S) out, on the CPU or the GPU.

Where to crop, whether to flip and how to change the colours come in as per-sample arguments (`augment.py`); DALI's own
random generators are not used. Crop and resize are one step: cutting image_size of (image_size + crop_margin) from the
resized square is the same as resizing that share of the original. Images baked to that square are cut without any
resampling.

On a CPU DALI's resize and colour operators cost more than the decoding, so there DALI only decodes, and of a training
image only the region that is needed; `resize.py` and `colour.py` do the rest in compiled passes over cached pixels. The
GPU runs DALI's `resize`, `color_twist` and `crop_mirror_normalize`, which compute the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, colour_maps
from dist_train.data.colour import change_colours
from dist_train.data.resize import resize_region


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
        self.device_id = device_id
        self.depth = depth
        self._size, self._square = config.image_size, config.image_size + config.crop_margin
        self._cut_only = baked == (self._square if train else self._size)
        self._fed = 0
        self._under_way: deque[Augmentation] = deque()
        self._workers = threads
        self._threads = ThreadPoolExecutor(threads)
        mean, std = np.array(config.mean), np.array(config.std)
        self._normalise = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        graph = _graph(config, train, self._cut_only, device_id is not None)
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
            self._under_way.append(augmentation)
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
        if self.device_id is None:
            return self._take_on_cpu()
        (output,) = self._pipeline.share_outputs(cuda_stream=torch.cuda.current_stream(self.device_id))
        tensor = torch.from_dlpack(output.as_tensor())
        self._pipeline.release_outputs()  # DALI reuses the memory only when the tensor is gone
        return tensor

    def _take_on_cpu(self) -> torch.Tensor:
        """Resize and colour what DALI decoded, the batch shared out among the threads."""
        outputs = self._pipeline.share_outputs()
        augmentation = self._under_way.popleft()
        batch = len(augmentation.flip)
        out = torch.empty(batch, 3, self._size, self._size)
        maps, target = colour_maps(augmentation), out.numpy()
        if self._cut_only:
            pixels = np.asarray(outputs[0].as_tensor())
        else:
            pixels = np.empty((batch, self._size, self._size, 3), np.uint8)
            decoded = [np.asarray(image) for image in outputs[0]]
            start, length, origin, full = self._regions(decoded, augmentation, outputs[1:])

        def part(first: int, end: int) -> None:
            if not self._cut_only:
                for i in range(first, end):
                    resize_region(decoded[i], origin[i], full[i], start[i], length[i], pixels[i])
            some = slice(first, end)
            change_colours(pixels[some], maps[some], augmentation.flip[some], *self._normalise, target[some])

        bounds = np.linspace(0, batch, self._workers + 1).astype(int)
        for done in [self._threads.submit(part, *ends) for ends in pairwise(bounds.tolist())]:
            done.result()
        self._pipeline.release_outputs()
        return out

    def _regions(
        self, decoded: list[NDArray[np.uint8]], augmentation: Augmentation, places: Sequence[Any]
    ) -> tuple[NDArray[Any], ...]:
        """What to resize: start, length, origin of what was decoded, size of the whole; (B, 2), (y, x) in pixels."""
        if not self.train:
            full = np.array([image.shape[:2] for image in decoded], np.int32)
            nothing = np.zeros_like(full)
            return nothing.astype(np.float64), full.astype(np.float64), nothing, full
        origin, full = (np.asarray(place.as_tensor()) for place in places)
        return augmentation.crop / self._square * full, self._size / self._square * full, origin, full


def _graph(config: DataConfig, train: bool, cut_only: bool, gpu: bool) -> Callable[[], Any]:
    size, square = config.image_size, config.image_size + config.crop_margin
    decode: dict[str, Any] = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}
    if gpu:
        # Else the GPU's decoder repeats the colours of subsampled images where the CPU's blends them.
        decode["jpeg_fancy_upsampling"] = True
    resize = {"device": "gpu", "size": [size, size], "interp_type": types.INTERP_TRIANGULAR}

    def graph() -> Any:
        encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1, no_copy=True)
        if train and cut_only:
            crop = fn.external_source(name="crop", dtype=types.INT32, ndim=1)
            image = fn.decoders.image_slice(encoded, crop, [size, size], axis_names="HW", **decode)
            return _colour_on_gpu(config, image) if gpu else image
        if train:
            crop = fn.external_source(name="crop", dtype=types.FLOAT, ndim=1) / square
            if not gpu:
                return _decode_region(encoded, crop, size, square, decode)
            resize.update(roi_start=crop, roi_end=crop + size / square, roi_relative=True)
        image = fn.decoders.image(encoded, **decode)
        if gpu:
            return _colour_on_gpu(config, image if cut_only else fn.resize(image, **resize))
        return image

    return graph


def _decode_region(encoded: Any, crop: Any, size: int, square: int, decode: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The pixels that a region's resize reads, where they begin, and the size of the whole image; (y, x) in pixels."""
    full = fn.cast(fn.slice(fn.peek_image_shape(encoded), [0], [2], axes=[0]), dtype=types.FLOAT)
    reach = math.floor(full / square) + 2  # the resize reads at most an output pixel and a half beyond the region
    begin = math.max(math.floor(crop * full) - reach, 0.0)
    end = math.min(math.ceil((crop + size / square) * full) + reach, full)
    begin, extent = (fn.cast(value, dtype=types.INT32) for value in (begin, end - begin))
    image = fn.decoders.image_slice(encoded, begin, extent, axis_names="HW", **decode)
    return image, begin, fn.cast(full, dtype=types.INT32)


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
