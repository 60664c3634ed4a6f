"""Training on several ranks without a launcher: forked from a process that has imported everything, to start fast."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys

from dist_train.cli import run_training
from dist_train.errors import run_command


def train_on(ranks: int, options: list[str]) -> None:
    """Run `dist-train train` with the options on that many processes of this machine; all must end well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.train.loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run_rank, args=(rank, ranks, port, options)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * ranks


def _run_rank(rank: int, ranks: int, port: int, options: list[str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    sys.exit(run_command(lambda: run_training(options)))
