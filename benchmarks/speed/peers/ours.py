"""This project's training loader."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.speed.peers import Task
from dist_train.config import DataConfig
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.pipeline import load_compiled_passes
from dist_train.place import Place

load_compiled_passes()  # as the other contestants import what they use before the clock starts


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    config = DataConfig(
        shards=task.shards, image_size=task.size, crop_margin=task.margin, threads=task.threads, device="cpu"
    )
    if task.usual:
        no_jitter: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
        scale, ratio = task.crop_range
        config = replace(config, crop="random_resized", crop_scale=scale, crop_ratio=ratio, **no_jitter)
    loader = TrainLoader(
        config, read_manifest(task.shards), Place(), batch_size=task.batch_size, micro_batch=task.batch_size, seed=0
    )
    return (batch.images for batch in loader)


def preparing_s() -> float:
    """Processor seconds so far of the thread that prepares the batches; the threads that decode are not in it."""
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "batches")
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
