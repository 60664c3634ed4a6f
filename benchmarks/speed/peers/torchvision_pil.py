"""torchvision's v2 transforms on Pillow images in PyTorch's DataLoader, as most training scripts have it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torchvision.transforms import v2

from benchmarks.speed.peers import Task
from benchmarks.speed.peers.torchvision_v2 import TarImages, data_loader, endless, transforms

NOTE = "decoded by Pillow, transforms on Pillow images"


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    *geometry_and_colour, to_float, normalise = transforms(task).transforms
    augment = v2.Compose([*geometry_and_colour, v2.ToImage(), to_float, normalise])
    return endless(data_loader(TarImages(task.tars, decode, augment), task))


def decode(encoded: bytearray) -> Image.Image:
    """An RGB image."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")
