"""A rank of the run that `benchmarks/claims/kill.py` kills: it says where it is, and records its steps' samples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dist_train.data.loader import Batch, TrainLoader
from dist_train.errors import run_command
from dist_train.files import write_atomically
from dist_train.train import inputs, loop
from dist_train.train.checkpoint import CheckpointWriter
from dist_train.train.step import TrainStep


def run_rank(environment: dict[str, str], samples: Path, options: list[str], marks: Connection | None) -> None:
    """Train by the options of `dist-train train`. samples: file for a line per micro-batch, the step and its samples.
    marks: gets (phase, "begin" or "end") around steps, evaluations and the writing of checkpoints."""
    from dist_train.cli import run_training

    os.environ.update(environment)
    sys.stderr = open(os.devnull, "w")

    class RecordedLoader(TrainLoader):
        """Records its batches, and drops from the file what comes after the step that it resumes from."""

        def __iter__(self) -> Iterator[Batch]:
            done = self.start // self.plan.batch_size
            before = samples.read_text().splitlines(keepends=True) if samples.exists() else []
            write_atomically(samples, "".join(line for line in before if json.loads(line)[0] <= done).encode())
            with open(samples, "a", buffering=1) as file:
                for step, batch in enumerate(super().__iter__(), done + 1):
                    file.write(json.dumps([step, batch.samples.tolist()]) + "\n")
                    yield batch

    def mark(owner: Any, name: str, phase: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def marked(*arguments: Any, **named: Any) -> Any:
            assert marks is not None
            marks.send((phase, "begin"))
            answer = function(*arguments, **named)
            marks.send((phase, "end"))
            return answer

        setattr(owner, name, marked)

    vars(inputs)["TrainLoader"] = RecordedLoader
    if marks is not None:
        mark(TrainStep, "__call__", "step")
        mark(loop, "evaluate_split", "evaluation")
        mark(CheckpointWriter, "_write", "checkpoint")
    sys.exit(run_command(lambda: run_training(options)))
