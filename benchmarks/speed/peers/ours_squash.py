"""This project's training loader with the paper's augmentation, beside what it does with the usual one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.speed.peers import Task
from benchmarks.speed.peers.ours import batches as own_batches

NOTE = "squash, crop, flip and colour jitter"


def batches(task: Task) -> Iterator[Any]:
    """Batches of images."""
    return own_batches(replace(task, usual=False))
