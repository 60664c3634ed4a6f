"""The webdataset library in PyTorch's DataLoader, with torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import webdataset

from benchmarks.speed.peers import Task
from benchmarks.speed.peers.torchvision_v2 import data_loader, decode, endless, transforms
from dist_train.data.manifest import read_manifest

NOTE = (
    "transforms as torchvision v2 on tensors; shards are shared out among the workers, of which there are no more than "
    "have shards with a batch of images"
)


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    augment = transforms(task)

    def prepare(sample: dict[str, Any]) -> tuple[Any, int]:
        return augment(decode(bytearray(sample["jpg"]))), int(sample["cls"])

    dataset = (
        webdataset.WebDataset(
            [str(tar) for tar in task.tars], shardshuffle=len(task.tars), workersplitter=webdataset.split_by_worker
        )
        .shuffle(1000)
        .map(prepare)
        .batched(task.batch_size, partial=False)
        .repeat()
    )
    options = {"batch_size": None, "shuffle": False, "drop_last": False, "num_workers": workers(task)}
    return endless(data_loader(dataset, task, **options))


def workers(task: Task) -> int:
    """The largest number, up to the task's, of which each has shards with a batch of images: one that has none would
    raise an error or look for them without end."""
    counts = read_manifest(task.shards).split("train").shard_samples
    for number in range(task.threads, 1, -1):
        if all(sum(counts[worker::number]) >= task.batch_size for worker in range(number)):
            return number
    return 1
