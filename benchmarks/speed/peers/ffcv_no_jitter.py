"""FFCV without colour jitter: crop, flip and normalisation only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.speed.peers import Task
from benchmarks.speed.peers.ffcv_loader import batches as ffcv_batches
from benchmarks.speed.peers.ffcv_loader import prepare  # noqa: F401  (the same file)

NOTE = "no colour jitter"


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    return ffcv_batches(task, jitter=False)
