"""The checkpoints of a run, as files: which there are, which one is meant, whether it is whole, and its tensors.

`dist_train.train.checkpoint` says what lies in one, and writes it. Whatever reads a model does it by this module.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dist_train.errors import UseError, WorkError

WEIGHTS_NAME = "weights.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
EXTRA_NAME = "extra.safetensors"
STATE_NAME = "state.json"
CHECKSUMS_NAME = "checksums.json"
log = logging.getLogger(__name__)


# ---------------------------------------------------------------------- which checkpoint
def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; each was complete when it was written."""
    return sorted(folder for folder in (run / "checkpoints").glob("step-*[0-9]") if folder.is_dir())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest undamaged checkpoint, or None if there is none at all. Damaged ones are named in a warning each.

    Raises WorkError where there are checkpoints, but all are damaged.
    """
    checkpoints = list_checkpoints(run)
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        log.warning("%s is damaged, so the one before it is used: %s", checkpoint, damage)
    if checkpoints:
        raise WorkError(f"{run / 'checkpoints'}: every checkpoint is damaged; delete {run} to start again")
    return None


@dataclass(frozen=True)
class Choice:
    """A checkpoint that was chosen, undamaged, and what it is of its run."""

    checkpoint: Path
    step: int
    why: str

    def __str__(self) -> str:
        return f"{self.checkpoint}: step {self.step}, {self.why}"


def choose_checkpoint(run: Path, which: str, option: str = "--checkpoint") -> Choice:
    """The checkpoint of a run that is meant by `which`:

    `best` (on val, by train.monitor), `last` (the newest), a step, the folder of any, or `auto`: the best if val was
    evaluated and it is there undamaged, else the last. Raises UseError, as of `option`, where there is no such
    checkpoint, naming those that there are; WorkError where it is damaged.
    """
    if which not in ("auto", "best", "last") and not which.isdecimal():
        return _given(Path(which), run, option)
    newest = newest_checkpoint(run)
    if newest is None:
        raise UseError(f"{run}: no complete checkpoint; train first")
    best_step, value = _best(newest)
    if which.isdecimal():
        chosen = checkpoint_folder(run, int(which))
        if not chosen.is_dir():
            raise UseError(f"{option} {which}: {run} has no checkpoint of that step; {_those_of(run)}")
        _refuse_damage(chosen, option)
        return Choice(chosen, int(which), _describe(chosen, newest, best_step, value))
    if which != "last" and best_step >= 0:
        best = checkpoint_folder(run, best_step)
        damage = find_damage(best) if best.is_dir() else "it is not there"
        if damage is None:
            return Choice(best, best_step, _describe(best, newest, best_step, value))
        if which == "best":
            raise WorkError(f"{best}, the best on val, cannot be used: {damage}; use {option} last")
        log.warning("%s, the best on val, cannot be used: %s", best, damage)
    elif which == "best":
        raise UseError(f"{option} best: {run} was never evaluated on val; use {option} last")
    return Choice(newest, read_step(newest), _describe(newest, newest, best_step, value))


def _given(folder: Path, run: Path, option: str) -> Choice:
    if not (folder / STATE_NAME).is_file():
        raise UseError(
            f"{option} {folder}: no such checkpoint; use auto, best, last, a step or a checkpoint's folder; "
            f"{_those_of(run)}"
        )
    _refuse_damage(folder, option)
    return Choice(folder, read_step(folder), "given by its folder")


def _refuse_damage(checkpoint: Path, option: str) -> None:
    damage = find_damage(checkpoint)
    if damage is not None:
        newest = "auto" if option == "--resume" else "last"
        raise WorkError(f"{checkpoint} is damaged: {damage}; {option} {newest} uses the newest that is not")


def _those_of(run: Path) -> str:
    steps = [folder.name.removeprefix("step-").lstrip("0") or "0" for folder in list_checkpoints(run)]
    return f"there are {', '.join(steps)}" if steps else "there are none"


def _best(newest: Path) -> tuple[int, str]:
    """(step, what of it was best) of the best val result as the newest checkpoint knows it; step -1 without any."""
    state = read_document(newest)["state"]
    metric, value = state.get("monitor", "top1"), state.get("best_value")
    name = {"top1": "top-1", "top5": "top-5", "class_mean": "class mean", "map": "mAP"}.get(metric, metric)
    return state.get("best_step", -1), f"{name} {state.get('best_top1', -1.0) if value is None else value:.4f}"


def _describe(checkpoint: Path, newest: Path, best_step: int, value: str) -> str:
    parts = ["the last"] if checkpoint == newest else []
    if read_step(checkpoint) == best_step:
        parts.append(f"the best on val ({value})")
    elif best_step >= 0:
        parts.append(f"the best on val is step {best_step}")
    elif not parts:
        parts.append("not the last")
    return ", ".join(parts)


def find_damage(checkpoint: Path) -> str | None:
    """The first thing by which a checkpoint is not what was written, or None; reads all of its files."""
    reading = CHECKSUMS_NAME
    try:
        described = json.loads((checkpoint / CHECKSUMS_NAME).read_text(encoding="utf-8"))
        for name, file in described.items():
            size = (checkpoint / name).stat().st_size
            if size != file["bytes"]:
                return f"{name} has {size} bytes instead of {file['bytes']}"
            if file_sha256(checkpoint / name) != file["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
        if STATE_NAME not in described:  # where it is, an older version wrote it
            reading = STATE_NAME
            document = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
            if document.pop("sha256") != document_sha256(document):
                return f"{STATE_NAME} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or reading).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{reading} is not what was written"
    return None


def document_sha256(document: dict[str, Any]) -> str:
    """The SHA-256, in hexadecimal, of what state.json says beside it."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------- what it holds
def read_document(checkpoint: Path) -> dict[str, Any]:
    """state.json: state, classes, recipe, loss_scale, sha256. Raises WorkError naming the file if it cannot be read."""
    path = checkpoint / STATE_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); delete {checkpoint} to use the one before") from None


def read_step(checkpoint: Path) -> int:
    """The optimizer steps after which the checkpoint was written."""
    return int(read_document(checkpoint)["state"]["step"])


def read_class_names(checkpoint: Path) -> list[str]:
    """Names of the classes that the checkpoint's model tells apart, in id order, or of the tags that it predicts."""
    return list(read_document(checkpoint)["classes"])


def read_thresholds(checkpoint: Path, averaged: bool = False) -> list[float] | None:
    """The thresholds of the tags, chosen on val for the raw or the averaged weights; None if val was not evaluated."""
    return read_document(checkpoint).get("thresholds", {}).get("averaged" if averaged else "raw")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The plain weights of a checkpoint."""
    return read_tensors(checkpoint / WEIGHTS_NAME)


def read_extra(checkpoint: Path) -> dict[str, Tensor]:
    """The further tensors that were given to `CheckpointWriter.save`; {} if none were."""
    return read_tensors(checkpoint / EXTRA_NAME) if (checkpoint / EXTRA_NAME).exists() else {}


def read_averaged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint. Raises UseError where the run has none."""
    averaged = read_extra(checkpoint)
    if not averaged:
        raise UseError(f"{checkpoint}: holds no averaged weights; they are there with train.ema above 0 from the start")
    return averaged


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one of its files. Raises WorkError naming the file if it cannot be read."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise WorkError(f"{path}: cannot be read ({error}); delete {path.parent} to use the one before") from None
