"""How much of the processor other processes take while a benchmark measures: where it is much, no time is right."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress

import psutil

BUSY = 0.1
"""Share of the cores' time from which a result says so."""
_of_orphans = 0.0  # seconds of processes of our own that were ended with their parent: nobody has them any more


class OtherProcesses:
    """The processor time of all processes but this one and those that it has started, since this was made.

    before: the share that they took when a result was begun that this process continues.
    """

    def __init__(self) -> None:
        self._begin, self._seconds = time.monotonic(), seconds_of_others()
        self._said = False
        self.before = 0.0

    def share(self) -> float:
        """Of the time of all cores of the machine, 0 to 1. Says once, to standard error, that it is much."""
        passed = time.monotonic() - self._begin
        gone = max(0.0, seconds_of_others() - self._seconds)
        share = min(1.0, gone / (passed * (psutil.cpu_count() or 1)))
        if share >= BUSY and passed >= 5 and not self._said:
            self._said = True
            note = f"note: other processes take {share:.0%} of the processor, which makes every time too long"
            print(f"{note}; where times matter, measure on an idle machine", file=sys.stderr)
        return round(max(share, self.before), 3)


def seconds_of_others() -> float:
    """What the processor has worked in all since the machine's start, less this process and all that it has started.

    By the machine's own count, as a process that has ended meanwhile is in no list of processes.
    """
    whole, kinds = psutil.cpu_times(), ("user", "nice", "system", "irq", "softirq")
    return sum(getattr(whole, kind, 0.0) for kind in kinds) - _of_orphans - seconds_of(with_children(os.getpid()))


def seconds_of(processes: Iterable[psutil.Process]) -> float:
    """Processor time of processes so far, and of those that they have started and seen end."""
    seconds = 0.0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended: what it took is its parent's, which comes before it
            times = process.cpu_times()
            seconds += times.user + times.system
            seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return seconds


def with_children(pid: int) -> list[psutil.Process]:
    """A process, if there is one, and all that it has started, the first before those that it started."""
    try:
        here = psutil.Process(pid)
        return [here, *here.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def count_orphans(processes: Sequence[psutil.Process]) -> None:
    """Keep the time of processes whose parent is about to be killed: it will not have seen them end."""
    global _of_orphans
    _of_orphans += seconds_of(processes)
