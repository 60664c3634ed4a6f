"""Times of steps and what follows from them: alone, and in turns with others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dist_train.train.meters import synchronize

Step = Callable[[int], Any]


def timed(step: Step, warmup: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each of `steps` calls of step(number), after `warmup` others.

    A GPU's own clock is read between the steps, so that the host runs ahead of it as it does in training.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + steps)]
        for number in range(warmup + steps):
            if number == warmup:
                synchronize(device)
                marks[0].record()
            step(number)
            if number >= warmup:
                marks[1 + number - warmup].record()
        synchronize(device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]
    times = []
    for number in range(warmup + steps):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    return times[warmup:]


def timed_in_turns(
    contestants: Mapping[str, Step], turns: int, warmup: int, steps: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Seconds of the contestants' steps by turn: A B, B A, A B, ...; each turn is `timed`.

    Whatever the machine does meanwhile meets all of them alike.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for turn in range(turns):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(timed(contestants[name], warmup, steps, device))
    return times


def median_ms(turns: list[list[float]]) -> float:
    """The median step of all turns, milliseconds."""
    return round(1000 * float(np.median(np.concatenate(turns))), 3)


def ratio(turns: list[list[float]], others: list[list[float]]) -> float:
    """The median over the turns of one contestant's median step over the other's."""
    pairs = zip(turns, others, strict=True)
    return round(float(np.median([np.median(mine) / np.median(its) for mine, its in pairs])), 4)


def step_figures(times: list[float], batch_size: int) -> dict[str, Any]:
    """Median and tail of the step times, and the throughput of the median step."""
    median, p95, p99 = np.percentile(times, [50, 95, 99])
    return {
        "steps": len(times),
        "step_ms": round(1000 * median, 2),
        "step_ms_p95": round(1000 * p95, 2),
        "step_ms_p99": round(1000 * p99, 2),
        "images_per_s": round(batch_size / median, 2),
    }
