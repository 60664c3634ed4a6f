"""What a run leaves behind: recipe.yaml, metrics.jsonl, summary.json, tensorboard/, log.txt. Rank 0 writes, alone.

A run that is resumed at step N loses what was recorded beyond N, and keeps under another name what was true until
then: `recipe-until-step-N.yaml` where the recipe has changed, `summary-step-N.json` of a run that was
complete and is made longer.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from PIL.Image import Image
from torch import Tensor

from dist_train.config import DataConfig, Recipe, recipe_to_dict
from dist_train.errors import WorkError
from dist_train.files import write_atomically
from dist_train.machine import ask_git, gpu_names, processor_name, software
from dist_train.recipe import METRICS_NAME
from dist_train.train.pictures import confusion_picture, contact_sheet, to_pixels

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from dist_train.data.background import Batch

RECIPE_NAME = "recipe.yaml"
SUMMARY_NAME = "summary.json"
WANDB_NAME = "wandb.json"
BOARD_NAME = "tensorboard"
_PICTURES = 32
"""Of the first batch, in TensorBoard."""
_PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda120", "timm", "transformers", "numpy", "dist-train")
log = logging.getLogger("dist_train")


class RunRecord:
    """Writes a run's files; on ranks other than 0 it does nothing.

    resumed_step: the optimizer steps that count; what an interrupted run logged beyond them is taken out, so that every
    step stands in the record once. former_recipe: that of the steps so far as a dictionary, where it was another one.
    """

    def __init__(
        self, run: Path, recipe: Recipe, rank: int, resumed_step: int, former_recipe: dict[str, Any] | None = None
    ) -> None:
        self.active = rank == 0
        self.run = run
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        run.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            log_file = _start_log(run / "log.txt")
            opened.callback(log_file.close)
            opened.callback(log.removeHandler, log_file)
            lines = _read_metrics(run / METRICS_NAME)
            self._wandb = _start_wandb(recipe, run, lines) if recipe.train.wandb_project else None
            if self._wandb is not None:
                opened.callback(self._wandb.finish)
            _keep_former_recipe(run, resumed_step, former_recipe)
            write_atomically(run / RECIPE_NAME, _yaml(recipe_to_dict(recipe)))
            _keep_former_summary(run, resumed_step)
            kept = [entry for entry in lines if entry["step"] <= resumed_step]
            write_atomically(run / METRICS_NAME, "".join(_json(entry) + "\n" for entry in kept).encode())
            self._evaluated = {(entry["split"], entry["step"]) for entry in kept if "split" in entry}
            self._metrics = opened.enter_context(open(run / METRICS_NAME, "a", encoding="utf-8"))
            opened.enter_context(_quiet_board_thread())
            if resumed_step == 0:  # nothing that an earlier start has left counts
                for file in (run / BOARD_NAME).glob("events.out.tfevents.*"):
                    file.unlink()
            self._board = SummaryWriter(str(run / BOARD_NAME), purge_step=resumed_step + 1)
            opened.callback(self._board.close)
            if resumed_step == 0:
                _write_hyperparameters(self._board, recipe)
            self._opened = opened.pop_all()

    def step(self, figures: dict[str, Any], total_steps: int, epochs: int) -> None:
        """Record a logged step and print its line."""
        if not self.active:
            return
        self._write(figures, "train")
        left = timedelta(seconds=round((total_steps - figures["step"]) * figures["step_ms"] / 1000))
        log.info(
            "step %(step)d/%(steps)d  epoch %(epoch).2f/%(epochs)d  loss %(loss).4f  lr %(lr).3g  "
            "%(images_per_s).1f images/s  wait %(data_wait_ms).1f ms  mfu %(mfu).2f  %(memory_mb).0f MB  %(left)s left",
            figures | {"steps": total_steps, "epochs": epochs, "left": left},
        )

    def first_batch(self, batch: Batch, data: DataConfig, class_names: Sequence[str]) -> None:
        """Show what the first step of the run trains on: images as they were augmented, with their classes."""
        if self.active and batch.images.ndim == 4:  # else features in their place, which nobody can look at
            pixels = to_pixels(batch.images[:_PICTURES], data)
            captions = [[(class_names[label], "black")] for label in batch.labels[:_PICTURES].tolist()]
            self._picture("train/first_batch", contact_sheet(list(pixels), captions), step=1)

    def evaluation(
        self, figures: dict[str, Any], confusion: Tensor | None = None, class_names: Sequence[str] = ()
    ) -> None:
        """Record an evaluation and print its line. One that stands in the record already is not written again.

        confusion: (C, C), samples by true and predicted class, to be shown as a picture.
        """
        if not self.active:
            return
        if (figures["split"], figures["step"]) not in self._evaluated:
            if confusion is not None:
                picture = confusion_picture(confusion.numpy(), class_names)
                self._picture(f"{figures['split']}/confusion", picture, figures["step"])
            self._write(figures, figures["split"])
        left_out = ", %(bad_samples)d bad ones left out" if figures["bad_samples"] else ""
        of_tags = "mAP %(map).4f  F1 %(f1_micro).4f micro, %(f1_macro).4f macro"
        result = of_tags if "map" in figures else "top-1 %(top1).4f  top-5 %(top5).4f"
        log.info(
            f"%(split)s after step %(step)d: {result}  loss %(loss).4f  over %(samples)d samples{left_out}", figures
        )

    def summary(self, figures: dict[str, Any]) -> None:
        """Write summary.json."""
        if self.active:
            document = _json(figures | describe_software(), indent=1) + "\n"
            write_atomically(self.run / SUMMARY_NAME, document.encode())

    def close(self) -> None:
        """Flush everything; the record takes nothing more."""
        if self.active:
            self._opened.close()

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _picture(self, name: str, picture: Image, step: int) -> None:
        self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def _write(self, figures: dict[str, Any], group: str) -> None:
        self._metrics.write(_json(figures) + "\n")
        self._metrics.flush()
        values = {f"{group}/{name}": value for name, value in figures.items() if name not in ("step", "split")}
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, figures["step"])
        if self._wandb is not None:
            self._wandb.log(group, values, figures["step"])


def _write_hyperparameters(board: SummaryWriter, recipe: Recipe) -> None:
    """What TensorBoard's table of hyperparameters has of the run: the recipe's keys, and the last values of the curves
    that are its result."""
    from torch.utils.tensorboard.summary import hparams

    keys = {
        f"{section}.{key}": value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for section, entries in recipe_to_dict(recipe).items()
        for key, value in entries.items()
    }
    metrics = dict.fromkeys(("train/loss", "val/top1", "val/loss", "test/top1", "test/loss"))
    for summary in hparams(keys, metrics)[:2]:  # the third says that the run has ended
        board._get_file_writer().add_summary(summary)


class _LogFile(logging.FileHandler):
    """log.txt. Where it cannot be written the run continues until something else cannot be, whose error says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Without the traceback that logging prints."""


@contextmanager
def _quiet_board_thread() -> Iterator[None]:
    """TensorBoard's writing thread ends by the disk's error, which the next call raises: it needs no traceback."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        of_board = type(arguments.thread).__module__.startswith("tensorboard")
        if not (of_board and issubclass(arguments.exc_type, OSError)):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _start_log(path: Path) -> logging.Handler:
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return handler


# ---------------------------------------------------------------------- what earlier starts of the run have left
def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl. Lines that are none, as the last where the disk was full, are left out; says so."""
    entries, cut = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            cut += 1
    if cut:
        log.warning("%s: %d %s left out, cut when it was written", path, cut, "line is" if cut == 1 else "lines are")
    return entries


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl of a run folder says of evaluations, in the order in which they were made."""
    return [entry for entry in _read_metrics(run / METRICS_NAME) if "split" in entry]


def _keep_former_recipe(run: Path, step: int, recipe: dict[str, Any] | None) -> None:
    for file in run.glob("recipe-until-step-*.yaml"):
        if int(file.stem.rpartition("-")[2]) > step:  # of a past that was left by resuming before it
            file.unlink()
    if recipe is not None:
        write_atomically(run / f"recipe-until-step-{step:08d}.yaml", _yaml(recipe))


def _keep_former_summary(run: Path, step: int) -> None:
    """A summary belongs to a complete run: when that is continued, rename it; remove it with its steps."""
    for file in [run / SUMMARY_NAME, *run.glob("summary-step-*.json")]:
        steps = read_summary(file).get("steps")
        if file.name == SUMMARY_NAME and isinstance(steps, int) and steps <= step:
            file.replace(run / f"summary-step-{steps:08d}.json")
        elif not isinstance(steps, int) or steps > step:
            file.unlink(missing_ok=True)


def read_summary(file: Path) -> dict[str, Any]:
    """What a summary says; {} where none can be read."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


# ---------------------------------------------------------------------- Weights & Biases
class _Wandb:
    """One run there for one run folder, however often it was resumed, offline too.

    RUN/wandb.json holds its id, and the last step of each group (train, val, ...) that earlier processes may have sent:
    those are not sent again, as nothing that was sent can be taken back.
    """

    def __init__(self, run: Any, sent: dict[str, int]) -> None:
        self._run, self._sent = run, sent
        self.finish = run.finish

    def log(self, group: str, values: dict[str, Any], step: int) -> None:
        if step > self._sent.get(group, -1):
            self._run.log(values, step=step)


def _start_wandb(recipe: Recipe, run: Path, lines: list[dict[str, Any]]) -> _Wandb:
    """lines: the record as earlier processes left it."""
    import wandb  # `recipe.check` has seen to it that it is there

    file = run / WANDB_NAME
    before = read_summary(file)
    sent: dict[str, int] = before.get("sent", {})
    if before:
        for entry in lines:
            group = entry.get("split", "train")
            sent[group] = max(sent.get(group, -1), entry["step"])
    # WANDB_RUN_ID is wandb's own way to say it; a sweep's agent does.
    name = before.get("id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    write_atomically(file, (json.dumps({"id": name, "sent": sent}) + "\n").encode())
    try:
        started = wandb.init(project=recipe.train.wandb_project, id=name, name=run.name, dir=str(run), resume="allow")
    except wandb.errors.Error as error:
        raise WorkError(f"train.wandb_project {recipe.train.wandb_project}: {' '.join(str(error).split())}") from None
    started.config.update(asdict(recipe), allow_val_change=True)  # resumed, it may have other values
    return _Wandb(started, sent)


# ---------------------------------------------------------------------- the rest
def start_console_log(rank: int) -> None:
    """Send the project's log lines to stderr: rank 0 all of them, other ranks warnings and errors only."""
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log.handlers = [console]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


def describe_software() -> dict[str, Any]:
    """Versions, git commit (None outside a checkout) and hardware, for a run's summary."""
    return {
        "versions": software(_PACKAGES),
        "commit": ask_git("rev-parse", "HEAD") or None,
        "hardware": {"cpu": processor_name(), "cores": torch.get_num_threads(), "gpus": gpu_names()},
    }


def _json(document: dict[str, Any], indent: int | None = None) -> str:
    """JSON text in which a number that is not finite is null: for NaN and infinity JSON has no word, and readers other
    than Python's stop at them."""

    def readable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: readable(its) for key, its in value.items()}
        if isinstance(value, list | tuple):
            return [readable(its) for its in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(readable(document), indent=indent, allow_nan=False)


def _yaml(recipe: dict[str, Any]) -> bytes:
    return yaml.safe_dump(recipe, sort_keys=False).encode()
