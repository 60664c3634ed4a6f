"""Jobs spread over workers: building, adopting and verifying work shard by shard, in processes here or on a cluster.

Processes are spawned, not forked (a fork of a process with threads can hang). They end when their parent does, however
it ends, and they count the images that they finish, for the progress line.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

from tqdm import tqdm

from dist_train.errors import UseError, WorkError

Result = TypeVar("Result")

RAY = "ray"
"""In the place of a number of workers: a Ray cluster."""

_ATTEMPTS = 3
_SECONDS_BETWEEN_LINES = 30.0

_images_done: Any = None  # a shared integer (multiprocessing.Value), set in worker processes


class WorkerDied(Exception):
    """The process that a job ran in ended before the job did."""

    def __init__(self) -> None:
        super().__init__("its worker process died: killed, or out of memory")


def count_image() -> None:
    """Called by a job after each image; does nothing outside a worker process."""
    if _images_done is not None:
        with _images_done.get_lock():
            _images_done.value += 1


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
    if workers == RAY:
        from shards.cluster import RayCluster

        engine: Any = RayCluster()
    else:
        engine = _Processes(min(int(workers), len(jobs)))
    waiting = deque(jobs)
    attempts: Counter[str] = Counter()
    running: dict[Future[Result], str] = {}
    failed: dict[str, Exception] = {}
    try:
        with _Progress(images, len(jobs), what, engine.images_done() is not None) as progress:
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
                    elif attempts[name] < _ATTEMPTS:
                        reason = " ".join(f"{type(error).__name__}: {error}".split())
                        print(f"{what}: {name} failed ({reason}); trying it again", file=sys.stderr, flush=True)
                        waiting.append(name)
                    else:
                        failed[name] = error
                progress.show(engine.images_done())
    finally:
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


class _Processes:
    """Worker processes on this machine; each is a pool of its own, so that it is known what a dying one worked on."""

    def __init__(self, workers: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._done = self._context.Value("q", 0)
        self._others = set(multiprocessing.active_children())
        self._idle = [self._start() for _ in range(workers)]
        self._busy: dict[Future[Any], ProcessPoolExecutor] = {}
        self.slots = workers

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Start a job; no more than `slots` at a time."""
        pool = self._idle.pop()
        future = pool.submit(function, *arguments)
        self._busy[future] = pool
        return future

    def finish(self, future: Future[Any]) -> Exception | None:
        """To be called when a job has ended; returns what it raised, WorkerDied if its process died."""
        pool = self._busy.pop(future)
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            pool.shutdown()
            self._idle.append(self._start())
            return WorkerDied()
        self._idle.append(pool)
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def images_done(self) -> int:
        """Images that all workers together have finished."""
        return self._done.value

    def close(self, kill: bool) -> None:
        """End the processes; kill: those at work too."""
        if kill:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        for pool in [*self._idle, *self._busy.values()]:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, initializer=_start_worker, initargs=(self._done,))


def _start_worker(images_done: Any) -> None:
    global _images_done
    _images_done = images_done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


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

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
