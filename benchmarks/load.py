"""How much of the processor other processes take while a benchmark measures: where it is much, no time is right."""

from __future__ import annotations

import sys
import time

import psutil

BUSY = 0.1
"""Share of the cores' time from which a result says so."""


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
    """Of those that run now, with what those that they waited for have taken."""
    own = psutil.Process()
    mine = {own.pid, *(process.pid for process in own.children(recursive=True))}
    total = 0.0
    for process in psutil.process_iter(["cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in mine and times is not None:
            total += times.user + times.system
            if process.pid != 1:  # it waits for what this process has started and left, too
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total
