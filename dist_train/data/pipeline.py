"""The DALI graph: encoded images in, normalised float tensors (3, S, S) out, on the CPU or the GPU.

Where to crop, whether to flip and how to change the colours come in as per-sample arguments (`augment.py`); DALI's own
random generators are not used. Crop and resize are one step: cutting image_size of (image_size + crop_margin) from the
resized square is the same as resizing that share of the original. Images baked to that square are cut without any
resampling, and then only the region is decoded.

The colour change is the cost on a CPU, so there DALI ends with uint8 pixels and `colour.py` does the rest in one pass;
the GPU runs DALI's `color_twist` and `crop_mirror_normalize`, which compute the same map.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def

from dist_train.config import DataConfig
from dist_train.data.augment import Augmentation, colour_maps
from dist_train.data.colour import change_colours


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
        self._colours: deque[tuple[NDArray[np.float32], NDArray[np.bool_]]] = deque()
        self._workers = threads
        self._threads = ThreadPoolExecutor(threads)
        mean, std = np.array(config.mean), np.array(config.std)
        self._normalise = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
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
            self._colours.append((colour_maps(augmentation), augmentation.flip))
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
        return self._change_colours(tensor) if self.device_id is None else tensor

    def _change_colours(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) uint8 to (B, 3, S, S) float32, the batch shared out among the threads."""
        maps, flip = self._colours.popleft()
        batch, height, width, channels = pixels.shape
        out = torch.empty(batch, channels, height, width)
        source, target = pixels.numpy(), out.numpy()

        def part(first: int, end: int) -> None:
            change_colours(source[first:end], maps[first:end], flip[first:end], *self._normalise, target[first:end])

        bounds = np.linspace(0, batch, self._workers + 1).astype(int)
        for done in [self._threads.submit(part, *ends) for ends in pairwise(bounds.tolist())]:
            done.result()
        return out


def _graph(config: DataConfig, train: bool, baked: int | None, gpu: bool) -> Callable[[], Any]:
    size, square = config.image_size, config.image_size + config.crop_margin
    decoder_device, device = ("mixed", "gpu") if gpu else ("cpu", "cpu")
    resize = {"device": device, "size": [size, size], "interp_type": types.INTERP_TRIANGULAR}

    def graph() -> Any:
        encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1, no_copy=True)
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
        return _colour_on_gpu(config, image) if gpu else image

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
