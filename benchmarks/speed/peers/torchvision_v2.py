"""torchvision's v2 transforms in PyTorch's DataLoader, over the same tars by random access."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from benchmarks.speed.peers import JITTER, MEAN, STD, Task
from dist_train.data.tarindex import read_index

NOTE = "decoded by torchvision.io, transforms on uint8 tensors"


class TarImages(Dataset[Any]):
    """The images of some tars, decoded and transformed."""

    def __init__(self, tars: list[Path], decode: Callable[[bytearray], Any], transform: Callable[[Any], Any]) -> None:
        images = [(tar, sample.image()) for tar in tars for sample in read_index(tar)]
        self.samples = [(tar, found[1]) for tar, found in images if found is not None]
        self.decode = decode
        self.transform = transform
        self.files: dict[Path, Any] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        tar, member = self.samples[index]
        if tar not in self.files:
            self.files[tar] = open(tar, "rb")  # once per worker
        self.files[tar].seek(member.offset)
        return self.transform(self.decode(bytearray(self.files[tar].read(member.size)))), 0


def transforms(task: Task) -> v2.Compose:
    """The paper's augmentation, or the usual one."""
    square = task.size + task.margin
    to_normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN] * 3, [STD] * 3)]
    if task.usual:
        scale, ratio = task.crop_range
        crop = v2.RandomResizedCrop(task.size, scale, ratio, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip(), *to_normalised])
    return v2.Compose(
        [
            v2.Resize((square, square), antialias=True),
            v2.RandomCrop(task.size),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(JITTER, JITTER, JITTER, JITTER),
            *to_normalised,
        ]
    )


def decode(encoded: bytearray) -> torch.Tensor:
    """(3, H, W) uint8."""
    return decode_image(torch.frombuffer(encoded, dtype=torch.uint8), ImageReadMode.RGB)


def endless(loader: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        for images, *_ in loader:
            yield images


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    return endless(data_loader(TarImages(task.tars, decode, transforms(task)), task))


def data_loader(dataset: Dataset[Any], task: Task, **options: Any) -> DataLoader[Any]:
    """PyTorch's loader with a worker process per core."""
    usual = {"batch_size": task.batch_size, "shuffle": True, "drop_last": True, "num_workers": task.threads}
    return DataLoader(dataset, persistent_workers=True, prefetch_factor=4, **usual | options)
