"""Several ranks without a launcher: forked from a process that has imported everything, to start fast."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from dist_train.cli import run_training
from dist_train.errors import run_command
from tests.harness import environment, free_port


def fork_ranks(ranks: int, folder: Path, function: Callable[..., None], *arguments: object) -> list[BaseProcess]:
    """Start `function(*arguments)` as that many ranks of this machine. What each says is in `rankN.log` of the folder;
    its exit code is that of a command.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.train.loop"])
    port, processes = free_port(), []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(context.Process(target=_run_rank, args=(place, folder, function, arguments)))
    with mock.patch.dict(os.environ, environment(), clear=True):  # the first that is started takes it for all
        for process in processes:
            process.start()
    return processes


def run_on(ranks: int, folder: Path, function: Callable[..., None], *arguments: object) -> None:
    """Run `function(*arguments)` on that many ranks of this machine; all must end well within 15 minutes."""
    processes = fork_ranks(ranks, folder, function, *arguments)
    end = time.monotonic() + 900
    try:
        for process in processes:
            process.join(max(0, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
    said = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(ranks))
    assert [process.exitcode for process in processes] == [0] * ranks, said


def train_on(ranks: int, options: list[str], folder: Path) -> None:
    """Run `dist-train train` with the options on that many ranks."""
    run_on(ranks, folder, run_training, options)


def _run_rank(
    place: dict[str, object], folder: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    with open(folder / f"rank{place['RANK']}.log", "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(run_command(lambda: function(*arguments)))
