"""One contestant in a process of its own: `python -m benchmarks.peers NAME TASK`, TASK as JSON.

Answers each line of its standard input with one JSON object a line: "start" makes the loader and takes the first batch;
"run SECONDS" takes batches for that long, after as many as the loader may have prepared before.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from benchmarks.peers import PREPARED, Task


def main() -> None:
    """Serve until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    name, task = sys.argv[1], Task(**json.loads(sys.argv[2]))
    contestant = importlib.import_module(f"benchmarks.peers.{name}")
    stream: Iterator[Any] = iter(())
    for line in sys.stdin:
        what, *arguments = line.split()
        if what == "prepare":
            answer = {"note": getattr(contestant, "NOTE", "")}
            if hasattr(contestant, "prepare"):
                contestant.prepare(task)
        elif what == "start":
            begin = time.perf_counter()
            stream = contestant.batches(task)
            next(stream)
            answer = {"first_batch_s": time.perf_counter() - begin}
        else:
            answer = run(stream, task.batch_size, float(arguments[0]), getattr(contestant, "preparing_s", None))
        print(json.dumps(answer), file=answers, flush=True)


def run(
    stream: Iterator[Any], batch_size: int, seconds: float, preparing_s: Callable[[], float] | None
) -> dict[str, float]:
    """Images of a run of about that many seconds, and its processor seconds: of this process and its workers, of the
    thread that takes the batches, and as `preparing_s` tells, if the contestant has it, of the one that prepares them.
    """
    for _ in range(PREPARED):
        next(stream)
    clocks = {"cpu_s": cpu_seconds, "taking_s": time.thread_time} | (
        {"preparing_s": preparing_s} if preparing_s else {}
    )
    images, before, begin = 0, {name: clock() for name, clock in clocks.items()}, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        next(stream)
        images += batch_size
    return {"images": images, "seconds": elapsed, **{name: clock() - before[name] for name, clock in clocks.items()}}


def cpu_seconds() -> float:
    """Processor time of this process and its workers so far."""
    here = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [here, *here.children(recursive=True)])


main()
