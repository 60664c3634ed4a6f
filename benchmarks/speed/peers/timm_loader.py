"""timm's loader and transforms over the same tars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm.data
import torch

from benchmarks.speed.peers import JITTER, MEAN, STD, Task
from benchmarks.speed.peers.torchvision_pil import decode
from benchmarks.speed.peers.torchvision_v2 import TarImages, endless

USUAL_NOTE = "its prefetcher normalises on the main process"
NOTE = f"RandomResizedCrop of 0.8 x 0.8 of the image; {USUAL_NOTE}"


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    scale, ratio = task.crop_range
    loader = timm.data.create_loader(
        TarImages(task.tars, decode, lambda image: image),  # create_loader sets its own transform
        task.size,
        task.batch_size,
        is_training=True,
        scale=scale,
        ratio=ratio,
        hflip=0.5,
        color_jitter=None if task.usual else (JITTER, JITTER, JITTER, JITTER),
        interpolation="bilinear",
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        num_workers=task.threads,
        use_prefetcher=True,
        device=torch.device("cpu"),
        pin_memory=False,
    )
    return endless(loader)
