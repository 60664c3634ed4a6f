"""One contestant in a process of its own, asked through `benchmarks/points.py`."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from benchmarks.load import seconds_of, with_children
from benchmarks.speed.peers import PREPARED, Task


@dataclass
class _Contestant:
    module: ModuleType
    task: Task
    stream: Iterator[Any] = field(default_factory=lambda: iter(()))


_contestants: list[_Contestant] = []  # the one of this process, once it is prepared


def answer(point: dict[str, Any]) -> Any:
    """Do what is asked: "prepare" names a module of this package and gives its "task", and is answered with its note;
    "start" makes the loader, takes the first batch and is answered with the seconds of that; "run" takes batches for
    so many seconds, after as many as the loader may have prepared before."""
    if "prepare" in point:
        module = importlib.import_module(f"benchmarks.speed.peers.{point['prepare']}")
        _contestants.append(_Contestant(module, Task(**point["task"])))
        if hasattr(module, "prepare"):
            module.prepare(_contestants[0].task)
        return note_of(module, _contestants[0].task.usual)
    contestant = _contestants[0]
    if "start" in point:
        begin = time.perf_counter()
        contestant.stream = contestant.module.batches(contestant.task)
        next(contestant.stream)
        return time.perf_counter() - begin
    preparing_s = getattr(contestant.module, "preparing_s", None)
    return _run(contestant.stream, contestant.task.batch_size, point["run"], preparing_s)


def note_of(module: ModuleType, usual: bool) -> str:
    """What a contestant does otherwise than asked."""
    note: str = getattr(module, "NOTE", "")
    return getattr(module, "USUAL_NOTE", note) if usual else note


def _run(
    stream: Iterator[Any], batch_size: int, seconds: float, preparing_s: Callable[[], float] | None
) -> dict[str, float]:
    """Images of a run of about that many seconds, and its processor seconds: of this process and its workers, of the
    thread that takes the batches, and as `preparing_s` tells, if the contestant has it, of the one that prepares them.
    """
    for _ in range(PREPARED):
        next(stream)
    clocks: dict[str, Callable[[], float]] = {
        "cpu_s": lambda: seconds_of(with_children(os.getpid())),
        "taking_s": time.thread_time,
    }
    if preparing_s is not None:
        clocks["preparing_s"] = preparing_s
    images, before, begin = 0, {name: clock() for name, clock in clocks.items()}, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        next(stream)
        images += batch_size
    return {"images": images, "seconds": elapsed, **{name: clock() - before[name] for name, clock in clocks.items()}}
