"""Training and loading from Python: what `import dist_train` offers beside the command line, in a notebook too."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_train.config import Recipe
from dist_train.errors import ToldAlready, WorkError
from dist_train.image_folder import with_shard_set
from dist_train.parse import expanded, recipe_from_python, recipe_from_run
from dist_train.recipe import METRICS_NAME, check, ranks_of_this_job

if TYPE_CHECKING:
    from dist_train.use.model import Model

RecipeLike = str | os.PathLike[str] | Recipe | Mapping[str, Any] | None
"""A recipe's file, a recipe, a mapping of its keys, or None for the defaults."""

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Run:
    """What training has left.

    folder: the run folder. summary: of a complete run what summary.json says: steps, evaluations by split with top1,
    top5 and loss, best_step, seconds, images_per_s and more; {} for one that was stopped before its end.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether it has made all of its steps; one that has not goes on with `resume="auto"`."""
        return bool(self.summary)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The entries of metrics.jsonl: one per logged step, and one with a `split` per evaluation."""
        lines = (self.folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def load(self, checkpoint: str | int | Path = "auto", *, averaged: bool = False) -> Model:
        """Its model; see `load`."""
        return load(self.folder, checkpoint, averaged=averaged)


def train(recipe: RecipeLike = None, /, *, resume: str | int | Path = "none", **overrides: Any) -> Run:
    """Train by a recipe in this process, as `dist-train train` does, and return when it is done.

    recipe: a file, a `Recipe` or a mapping. overrides: keys of the recipe, which win: `train(file, optim={"lr": 0.1})`
    or `train(file, **{"optim.lr": 0.1})`. resume: none, auto (the newest checkpoint of the run), a step or a folder.

    Uses this machine's GPU if there is one; for several, start the script with `deepspeed`. Sets torch's global seed.
    It saves and stops after the step that it is at when it is interrupted (KeyboardInterrupt follows) or the process is
    asked to end; everything else in the process is afterwards as it was before.

    Raises UseError for what cannot be done as asked, WorkError where the work fails, both with one line that names the
    cure. Afterwards it can be called again.
    """
    complete = recipe_from_python(recipe, overrides)
    check(complete, ranks_of_this_job(), resume=str(resume))
    try:
        complete = with_shard_set(complete)
    except ToldAlready as failure:
        raise WorkError(str(failure)) from None
    with _process_as_it_was() as stopped_by:
        from dist_train.train.loop import train as run_training

        if (number := run_training(complete, str(resume))) is not None:
            stopped_by.append(number)
    folder = Path(complete.train.run)
    from dist_train.train.record import SUMMARY_NAME, read_summary

    return Run(folder, read_summary(folder / SUMMARY_NAME))


def load(run: str | os.PathLike[str], checkpoint: str | int | Path = "auto", *, averaged: bool = False) -> Model:
    """The model of a run folder, ready to predict on this machine's device; says on stderr which checkpoint it is.

    checkpoint: best (on val), last, a step, a checkpoint's folder, or auto: the best if val was evaluated, else the
    last. averaged: with the averaged weights of train.ema. Raises UseError where there is no such run or checkpoint,
    WorkError where it is damaged.
    """
    folder = Path(expanded("the run", os.fspath(run)))
    recipe = recipe_from_run(folder)
    from dist_train.use.model import Model
    from dist_train.use.trained import load_trained

    return Model(**vars(load_trained(folder, recipe, str(checkpoint), averaged)))


@contextmanager
def _process_as_it_was() -> Iterator[list[int]]:
    """Gives back what training takes of the process: signals, the log, variables, the process group, memory.

    Signals that are put into the list are raised again when all this is done, for whom they were meant.
    """
    import torch

    log = logging.getLogger("dist_train")
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    variables = {name: os.environ.get(name) for name in _OF_RANKS}
    asked = {number: signal.getsignal(number) for number in _STOPPING}
    joined, linear = torch.distributed.is_initialized(), torch.nn.functional.linear
    excepthook = sys.excepthook
    meanwhile: list[int] = []
    try:
        yield meanwhile
    finally:
        if not joined and torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            from dist_train.train.engine import leave_process_group

            leave_process_group()
        torch.nn.functional.linear = linear  # DeepSpeed's ZeRO 3 puts another in its place
        sys.excepthook = excepthook  # of a process group, which names its rank in every traceback
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if threading.current_thread() is threading.main_thread():
            for number, handler in asked.items():
                if handler is not None:  # one that was not set from Python cannot be set from it
                    signal.signal(number, handler)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)
        gc.collect()  # engine and model refer to each other
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if "torch._dynamo" in sys.modules:  # which stops to compile after so many models
            torch._dynamo.reset()
    for received in meanwhile:
        signal.raise_signal(received)
