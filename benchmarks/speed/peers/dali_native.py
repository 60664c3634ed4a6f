"""DALI alone: its webdataset reader and its operators in the usual order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def

from benchmarks.speed.peers import JITTER, MEAN, STD, Task

NOTE = "jitter as one linear map: hue turned in YIQ, contrast around mid-grey"
USUAL_NOTE = ""


def batches(task: Task, device_id: int | None = None) -> Iterator[Any]:
    """Batches of images; device_id: the GPU that decodes and augments, or None for the CPU."""
    square = task.size + task.margin
    decoder = "cpu" if device_id is None else "mixed"

    @pipeline_def(
        batch_size=task.batch_size, num_threads=task.threads, device_id=device_id, prefetch_queue_depth=2, seed=0
    )
    def graph() -> Any:
        samples: Any = fn.readers.webdataset(
            paths=[str(tar) for tar in task.tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in task.tars],
            ext=["jpg;jpeg;png;webp", "cls"],
            random_shuffle=True,
            initial_fill=4096,
            pad_last_batch=True,
            name="reader",
        )
        if task.usual:
            scale, ratio = task.crop_range
            box: dict[str, Any] = {"random_area": list(scale), "random_aspect_ratio": list(ratio)}
            image = fn.decoders.image_random_crop(samples[0], device=decoder, output_type=types.RGB, **box)
            return _normalised(fn.resize(image, size=[task.size, task.size]))
        image = fn.resize(fn.decoders.image(samples[0], device=decoder, output_type=types.RGB), size=[square, square])
        image = fn.crop(
            image,
            crop=[task.size, task.size],
            crop_pos_x=fn.random.uniform(range=[0, 1]),
            crop_pos_y=fn.random.uniform(range=[0, 1]),
        )
        factor = [1 - JITTER, 1 + JITTER]
        image = fn.color_twist(
            image,
            brightness=fn.random.uniform(range=factor),
            contrast=fn.random.uniform(range=factor),
            saturation=fn.random.uniform(range=factor),
            hue=fn.random.uniform(range=[-360 * JITTER, 360 * JITTER]),
        )
        return _normalised(image)

    pipeline = graph()
    while True:
        (output,) = pipeline.run()
        yield torch.from_dlpack(output.as_tensor())


def _normalised(image: Any) -> Any:
    return fn.crop_mirror_normalize(
        image, mirror=fn.random.coin_flip(), mean=[255 * MEAN] * 3, std=[255 * STD] * 3, output_layout="CHW"
    )
