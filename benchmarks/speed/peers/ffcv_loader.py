"""FFCV on a .beton file made from the same images (JPEG, quality 92). Its jitter has no hue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.peers import JITTER, MEAN, STD, Task
from benchmarks.speed.peers.torchvision_pil import decode
from benchmarks.speed.peers.torchvision_v2 import TarImages
from dist_train.data.manifest import read_manifest

NOTE = "jitter without hue, applied to every image; region of 0.8 x 0.8 by RandomResizedCrop"
USUAL_NOTE = ""


def prepare(task: Task) -> None:
    """Write the images of the train split into FFCV's format, once."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = _beton(task)
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        fields = {"image": RGBImageField("jpg", jpeg_quality=92), "label": IntField()}
        writer = DatasetWriter(str(temporary), fields, num_workers=task.threads)
        writer.from_indexed_dataset(TarImages(task.tars, decode, np.asarray))
        os.replace(temporary, path)


def batches(task: Task, jitter: bool = True) -> Iterator[Any]:
    """Batches of images."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomBrightness,
        RandomContrast,
        RandomHorizontalFlip,
        RandomSaturation,
        ToTensor,
        ToTorchImage,
    )

    scale, ratio = task.crop_range
    colour = [operation(JITTER, p=1.0) for operation in (RandomBrightness, RandomContrast, RandomSaturation)]
    image = [
        RandomResizedCropRGBImageDecoder((task.size, task.size), scale=scale, ratio=ratio),
        RandomHorizontalFlip(),
        *(colour if jitter and not task.usual else []),
        NormalizeImage(np.full(3, 255 * MEAN), np.full(3, 255 * STD), np.float32),
        ToTensor(),
        ToTorchImage(channels_last=False),
    ]
    loader = Loader(
        str(_beton(task)),
        batch_size=task.batch_size,
        num_workers=task.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={"image": image, "label": None},
    )
    while True:
        for (images,) in loader:
            yield images


def _beton(task: Task) -> Path:
    digest = read_manifest(task.shards).digest
    return Path(task.scratch) / f"{hashlib.sha256(digest.encode()).hexdigest()[:16]}.beton"
