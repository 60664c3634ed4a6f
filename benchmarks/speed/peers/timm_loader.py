"""timm's loader and transforms over the same tars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm.data
import torch

from benchmarks.speed.peers import JITTER, MEAN, STD, Task
from benchmarks.speed.peers.torchvision_pil import decode
from benchmarks.speed.peers.torchvision_v2 import TarImages, endless

NOTE = "region of 0.8 x 0.8 of the image by RandomResizedCrop; its prefetcher normalises on the main process"


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    share = (task.size / (task.size + task.margin)) ** 2
    loader = timm.data.create_loader(
        TarImages(task.tars, decode, lambda image: image),  # create_loader sets its own transform
        task.size,
        task.batch_size,
        is_training=True,
        scale=(share, share),
        ratio=(1.0, 1.0),
        hflip=0.5,
        color_jitter=(JITTER, JITTER, JITTER, JITTER),
        interpolation="bilinear",
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        num_workers=task.threads,
        use_prefetcher=True,
        device=torch.device("cpu"),
        pin_memory=False,
    )
    return endless(loader)
