"""Worker processes on this machine, and what a job that runs in one may call.

Processes are spawned, not forked (a fork of a process with threads can hang). They end when their parent does, however
it ends, and they count the images that they finish, for the progress line.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

Result = TypeVar("Result")

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


class Processes:
    """Worker processes on this machine, `slots` of them.

    Each is a pool of its own: where one dies, it is known which job it was working on.
    """

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

    def finish(self, future: Future[Any]) -> BaseException | None:
        """To be called when a job has ended; returns what it raised, WorkerDied if its process died."""
        pool = self._busy.pop(future)
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            pool.shutdown()
            pool, error = self._start(), WorkerDied()
        self._idle.append(pool)
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
