"""Jobs spread over worker processes: building and verifying work shard by shard.

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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

from tqdm import tqdm

from dist_train.errors import UseError, WorkError

Result = TypeVar("Result")

_SECONDS_BETWEEN_LINES = 30.0

_images_done: Any = None  # a shared integer (multiprocessing.Value), set in worker processes


def count_image() -> None:
    """Called by a job after each image; does nothing outside a worker process."""
    if _images_done is not None:
        with _images_done.get_lock():
            _images_done.value += 1


def run_jobs(
    function: Callable[..., Result], jobs: dict[str, tuple[Any, ...]], workers: int, images: int, what: str
) -> Iterator[tuple[str, Result]]:
    """Call `function(*arguments)` in worker processes for each named job; yields (name, result) as they end.

    images: total over all jobs, for the progress line; what: its label. An exception in a job ends the others and is
    raised here. Raises WorkError naming the jobs that were running if a worker process dies, UseError without workers.
    """
    if workers < 1:
        raise UseError(f"--workers must be at least 1, not {workers}")
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker, initargs=(done,))
    waiting = list(jobs.items())[::-1]
    running: dict[Future[Result], str] = {}
    try:
        with _Progress(images, len(jobs), what) as progress:
            while waiting or running:
                # No more than one job a worker is handed out, so that what runs when a worker dies is known.
                while waiting and len(running) < workers:
                    name, arguments = waiting.pop()
                    running[pool.submit(function, *arguments)] = name
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    yield running[future], future.result()
                    del running[future]
                    progress.jobs_done += 1
                progress.show(done.value)
    except BrokenProcessPool:
        where = " or ".join(sorted(running.values())) or "its first shard"
        raise WorkError(
            f"a worker process died (killed, or out of memory) while on {where}; "
            "run the same command again, with --workers 1 to see which one it is"
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    """A bar on a terminal; elsewhere a line now and then. Both on stderr."""

    def __init__(self, images: int, jobs: int, what: str) -> None:
        self.images = images
        self.jobs = jobs
        self.jobs_done = 0
        self.what = what
        self.start = self.last_line = time.monotonic()
        self.bar = tqdm(total=images, desc=what, unit=" images") if sys.stderr.isatty() else None

    def show(self, images_done: int) -> None:
        """Bring the display up to date."""
        if self.bar is not None:
            self.bar.update(images_done - self.bar.n)
        elif time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            rate = images_done / (self.last_line - self.start)
            print(
                f"{self.what}: {images_done:,} of {self.images:,} images, {self.jobs_done} of {self.jobs} shards, "
                f"{rate:,.0f} images/s",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
