"""Jobs on a Ray cluster: `--workers ray`. The folders that a job names must be the same on every node."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from dist_train.errors import UseError, WorkError
from shards.processes import WorkerDied

Result = TypeVar("Result")


class RayCluster:
    """The cluster that RAY_ADDRESS names, else one that runs on this machine, else one started here for these jobs.

    `slots` is twice its CPUs, so that none waits for work. Raises UseError without Ray, WorkError without the cluster.
    """

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use over the internet
        try:
            import ray
        except ImportError:
            raise UseError("--workers ray needs Ray: pip install 'dist-train[ray]'") from None
        _check_address(os.environ.get("RAY_ADDRESS", ""))
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise WorkError(f"no Ray cluster by RAY_ADDRESS or on this machine: {reason}") from None
        self.slots = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._call = ray.remote(max_retries=0)(_call)
        self._running: dict[Future[Any], Any] = {}  # values: what Ray knows the jobs by

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Start a job on one CPU of the cluster, where another folder than here is the current one."""
        places = [argument.absolute() if isinstance(argument, Path) else argument for argument in arguments]
        reference = self._call.remote(function, *places)
        future = reference.future()
        self._running[future] = reference
        return future

    def finish(self, future: Future[Any]) -> BaseException | None:
        """To be called when a job has ended; returns what it raised, WorkerDied if its process or node died."""
        del self._running[future]
        error = future.exception()
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return error.cause if isinstance(error.cause, Exception) else error
        return WorkerDied() if isinstance(error, self._ray.exceptions.RayError) else error

    def images_done(self) -> int | None:
        """None: images are not counted across a cluster, only shards are."""
        return None

    def close(self, kill: bool) -> None:
        """Leave the cluster; kill: end the jobs that still run."""
        if kill:
            for reference in self._running.values():
                self._ray.cancel(reference, force=True)
        if self._started:
            self._ray.shutdown()


def _check_address(address: str) -> None:
    """Raises WorkError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise WorkError(f"RAY_ADDRESS {address}: no Ray cluster can be reached there ({error})") from None


def _call(function: Callable[..., Result], *arguments: Any) -> Result:
    return function(*arguments)
