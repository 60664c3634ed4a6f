"""Jobs spread over workers: building, adopting and verifying work shard by shard, in processes here or on a cluster."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

from tqdm import tqdm

from dist_train.errors import UseError, WorkError
from shards.cluster import RayCluster
from shards.processes import Processes, WorkerDied

Result = TypeVar("Result")

RAY = "ray"
"""In the place of a number of workers: a Ray cluster."""

_ATTEMPTS = 3
_SECONDS_BETWEEN_LINES = 30.0


def check_workers(workers: int | str) -> None:
    """Raises UseError if `workers` is neither a number of at least 1 nor "ray"."""
    if workers != RAY and (isinstance(workers, str) or workers < 1):
        raise UseError(f"--workers must be at least 1, or {RAY}, not {workers}")


def run_jobs(
    function: Callable[..., Result], jobs: dict[str, tuple[Any, ...]], workers: int | str, images: int, what: str
) -> Iterator[tuple[str, Result]]:
    """Call `function(*arguments)` in workers for each named job; yields (name, result) as they end.

    workers: processes on this machine, or "ray": the Ray cluster that RAY_ADDRESS names, or one started here. images:
    total over all jobs, for the progress line (0: not known); what: its label.

    A job that raises, or whose process dies, is tried again, up to 3 times in all. If it still fails, the others are
    finished and then WorkError names it; an exception that is no WorkError or UseError is raised as it is, with a note.
    Raises UseError if there are no such workers.
    """
    check_workers(workers)
    if not jobs:
        return
    engine = RayCluster() if workers == RAY else Processes(min(int(workers), len(jobs)))
    waiting = deque(jobs)
    attempts: Counter[str] = Counter()
    running: dict[Future[Result], str] = {}
    failed: dict[str, Exception] = {}
    progress = _Progress(images, len(jobs), what, counts_images=engine.images_done() is not None)
    try:
        while waiting or running:
            while waiting and len(running) < engine.slots:
                name = waiting.popleft()
                attempts[name] += 1
                running[engine.submit(function, *jobs[name])] = name
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                error = engine.finish(future)
                if error is None:
                    progress.jobs_done += 1
                    yield name, future.result()
                elif not isinstance(error, Exception):  # Ctrl-C, or an exit
                    raise error
                elif attempts[name] < _ATTEMPTS:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    print(f"{what}: {name} failed ({reason}); trying it again", file=sys.stderr, flush=True)
                    waiting.append(name)
                else:
                    failed[name] = error
            progress.show(engine.images_done())
    finally:
        progress.close()
        engine.close(kill=bool(running))
    if failed:
        raise _failure(failed)


def _failure(failed: dict[str, Exception]) -> Exception:
    """What to raise for the jobs that failed for good."""
    name, error = min(failed.items())
    if not isinstance(error, WorkError | UseError | WorkerDied):
        error.add_note(f"while on {name}")  # a bug: let it show where
        return error
    others = f" ({len(failed) - 1} more failed, {sorted(failed)[1]} the first of them)" if len(failed) > 1 else ""
    return WorkError(
        f"{error}; that was {name}{others}, tried {_ATTEMPTS} times, all others are done; "
        "run the same command again to go on"
    )


class _Progress:
    """A bar on a terminal; elsewhere a line now and then. Both on stderr. Without a count of images, of shards."""

    def __init__(self, images: int, jobs: int, what: str, counts_images: bool) -> None:
        self.images = images
        self.jobs = jobs
        self.jobs_done = 0
        self.what = what
        self.start = self.last_line = time.monotonic()
        total, unit = (images or None, " images") if counts_images else (jobs, " shards")
        self.bar = tqdm(total=total, desc=what, unit=unit) if sys.stderr.isatty() else None

    def show(self, images_done: int | None) -> None:
        """Bring the display up to date."""
        if self.bar is not None:
            self.bar.update((self.jobs_done if images_done is None else images_done) - self.bar.n)
        elif time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            line = f"{self.what}: {self.jobs_done} of {self.jobs} shards"
            if images_done is not None:
                total = f" of {self.images:,}" if self.images else ""
                rate = images_done / (self.last_line - self.start)
                line += f", {images_done:,}{total} images, {rate:,.0f} images/s"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
