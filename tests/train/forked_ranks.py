"""Several ranks without a launcher: forked from a process that has imported everything, to start fast."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dist_train.cli import run_training
from dist_train.errors import run_command
from tests.harness import free_port, place_of


def fork_ranks(ranks: int, folder: Path, function: Callable[..., object], *arguments: object) -> list[BaseProcess]:
    """Start `function(*arguments)` as that many ranks of this machine. What each says is in `rankN.log` of the folder;
    its exit code is that of a command.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.train.loop"])
    port = free_port()
    processes = [
        context.Process(target=_run_rank, args=(place_of(rank, ranks, port), folder, function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def train_on(ranks: int, options: list[str], folder: Path) -> None:
    """Run `dist-train train` with the options on that many ranks; all must end well."""
    processes = fork_ranks(ranks, folder, run_training, options)
    for process in processes:
        process.join()
    said = "\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(ranks))
    assert [process.exitcode for process in processes] == [0] * ranks, said


def _run_rank(place: dict[str, str], folder: Path, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ.update(place)
    with open(folder / f"rank{place['RANK']}.log", "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(run_command(lambda: function(*arguments)))
