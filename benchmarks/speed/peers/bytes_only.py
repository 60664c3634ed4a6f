"""A ceiling: the encoded bytes of the images in our order, copied once into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.speed.peers import Task
from dist_train.data.fetch import ShardFetcher
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import EpochPlan

NOTE = "a ceiling: reads the encoded images, does not decode them"


def encoded_batches(task: Task) -> Iterator[list[Any]]:
    """Views of the encoded images of one batch after another."""
    manifest = read_manifest(task.shards)
    split = manifest.split("train")
    fetcher = ShardFetcher(task.shards, split, len(manifest.classes))
    plan = EpochPlan(split.shard_samples, task.batch_size, seed=0)
    for positions in plan.batches(0):
        yield fetcher.fetch(positions, with_text=False).images


def batches(task: Task) -> Iterator[Any]:
    """Batches of encoded images, end to end."""
    return (np.concatenate(images) for images in encoded_batches(task))
