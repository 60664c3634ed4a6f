"""Training on several ranks without a launcher: forked from a process that has imported everything, to start fast."""

from __future__ import annotations

import multiprocessing
import os
import sys

from dist_train.cli import run_training
from dist_train.errors import run_command
from tests.harness import free_port, place_of


def train_on(ranks: int, options: list[str]) -> None:
    """Run `dist-train train` with the options on that many processes of this machine; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.train.loop"])
    port = free_port()
    processes = [context.Process(target=_run_rank, args=(rank, ranks, port, options)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def _run_rank(rank: int, ranks: int, port: int, options: list[str]) -> None:
    os.environ.update(place_of(rank, ranks, port))
    sys.exit(run_command(lambda: run_training(options)))
