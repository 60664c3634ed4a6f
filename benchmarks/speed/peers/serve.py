"""One contestant in a process of its own, asked through `benchmarks/points.py`."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from benchmarks.load import seconds_of, with_children
from benchmarks.speed.peers import PREPARED, Task

_running: dict[str, Any] = {}  # once it is started: the arguments of `_run`


def answer(point: dict[str, Any]) -> Any:
    """Do what is asked: "start" names a module of this package and gives its "task"; it prepares its data, makes its
    loader, takes the first batch and is answered with its note and the seconds of that. "run" takes batches for so many
    seconds, after as many as the loader may have prepared before."""
    if "run" in point:
        return _run(**_running, seconds=point["run"])
    module, task = importlib.import_module(f"benchmarks.speed.peers.{point['start']}"), Task(**point["task"])
    if hasattr(module, "prepare"):
        module.prepare(task)
    begin = time.perf_counter()
    stream = module.batches(task)
    next(stream)
    first_batch_s = time.perf_counter() - begin
    preparing_s = getattr(module, "preparing_s", None)
    _running.update(stream=stream, batch_size=task.batch_size, preparing_s=preparing_s)
    return {"note": note_of(module, task.usual), "first_batch_s": first_batch_s}


def note_of(module: ModuleType, usual: bool) -> str:
    """What a contestant does otherwise than asked."""
    note: str = getattr(module, "NOTE", "")
    return getattr(module, "USUAL_NOTE", note) if usual else note


def _run(
    stream: Iterator[Any], batch_size: int, preparing_s: Callable[[], float] | None, seconds: float
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
