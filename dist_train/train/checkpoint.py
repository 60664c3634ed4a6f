"""Checkpoints of a run: complete or absent, never half-written.

RUN/checkpoints/step-00000123/ holds
    state.json            where the run stood: step, samples consumed, seed, manifest digest, best result; the names of
                          the classes; the recipe
    weights.safetensors   the plain weights, float32, names as in the model
    ema.safetensors       the averaged weights, if the run has such, likewise
    engine/               DeepSpeed's own files: weights, optimizer, loss scale, one per rank
and RUN/checkpoints/latest names the newest. A checkpoint is written under a temporary name, synced, and renamed.
Random numbers need no state: order and augmentation are functions of the position, dropout is seeded by the step.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_train.config import Recipe
from dist_train.data.manifest import write_atomically
from dist_train.errors import UseError, WorkError

WEIGHTS_NAME = "weights.safetensors"
AVERAGE_NAME = "ema.safetensors"
STATE_NAME = "state.json"
_ENGINE_TAG = "engine"


@dataclass
class RunState:
    """Where a run stands between two optimizer steps. best_top1 and best_step are of the val split, -1 before any."""

    step: int
    samples_consumed: int
    seed: int
    batch_size: int
    world_size: int
    zero_stage: int
    precision: str
    num_classes: int
    manifest_digest: str
    best_top1: float = -1.0
    best_step: int = -1


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(folder for folder in (run / "checkpoints").glob("step-*[0-9]") if (folder / STATE_NAME).is_file())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(run)), None)


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the best val result if it is known and still there, else the newest."""
    newest = newest_checkpoint(run)
    if newest is None:
        return None
    best = checkpoint_folder(run, read_state(newest).best_step)
    return best if best.is_dir() else newest


def checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (none, auto, best or a path) means; None to start anew."""
    if resume == "none":
        return None
    if resume in ("auto", "best"):
        return newest_checkpoint(run) if resume == "auto" else best_checkpoint(run)
    if not Path(resume).is_dir():
        raise UseError(f"--resume {resume}: no such checkpoint; use auto, none or the folder of one")
    return Path(resume)


def read_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint. Raises WorkError naming the file if it is damaged."""
    path = checkpoint / STATE_NAME
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); delete {checkpoint} to use the one before") from None


def read_class_names(checkpoint: Path) -> list[str]:
    """Names of the classes that the checkpoint's model tells apart, in id order."""
    return list(json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["classes"])


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The plain weights of a checkpoint."""
    return _read_tensors(checkpoint / WEIGHTS_NAME)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own kinds for a damaged file
        raise WorkError(f"{path}: cannot be read ({error}); delete {path.parent} to use the one before") from None


def read_averaged_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint. Raises UseError where the run has none."""
    path = checkpoint / AVERAGE_NAME
    if not path.is_file():
        raise UseError(f"{checkpoint}: holds no averaged weights; they are there with train.ema above 0 from the start")
    return _read_tensors(path)


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    run: Path,
    state: RunState,
    recipe: Recipe,
    class_names: list[str],
    averaged: dict[str, Tensor] | None = None,
) -> None:
    """Write the checkpoint of `state`, with averaged weights if there are; all ranks call this together.

    Of the older ones, the newest train.keep_checkpoints - 1 and the best stay.
    """
    rank = torch.distributed.get_rank()
    final = checkpoint_folder(run, state.step)
    temporary = final.with_name(f"{final.name}.tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(temporary), tag=_ENGINE_TAG, save_latest=False)
    weights = gather_weights(engine)
    torch.distributed.barrier()
    if rank == 0:
        save_file(weights, temporary / WEIGHTS_NAME)
        if averaged is not None:
            save_file({name: tensor.contiguous() for name, tensor in averaged.items()}, temporary / AVERAGE_NAME)
        document = {"state": asdict(state), "classes": class_names, "recipe": asdict(recipe)}
        (temporary / STATE_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        _sync_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(final.parent)
        write_atomically(final.parent / "latest", f"{final.name}\n".encode())
        _remove_old(run, state, recipe.train.keep_checkpoints)
    torch.distributed.barrier()


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, checkpoint: Path, expected: RunState) -> RunState:
    """Put the engine back to where `checkpoint` was written. `expected` is what the recipe asks for.

    Raises UseError where the checkpoint belongs to another run: other data, seed, batch or classes.
    """
    state = read_state(checkpoint)
    check_resumable(checkpoint, state, expected)
    loaded, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE_TAG)
    if loaded is None:
        raise WorkError(f"{checkpoint}: DeepSpeed's files are missing; delete it to use the one before")
    return state


def check_resumable(checkpoint: Path, state: RunState, expected: RunState) -> None:
    """Raise UseError naming the first thing in which the checkpoint differs from what the recipe asks for."""
    names = {
        "num_classes": "classes of the shard set",
        "manifest_digest": "manifest digest of the shard set",
        "seed": "train.seed",
        "batch_size": "train.batch_size",
        "world_size": "number of ranks",
        "zero_stage": "deepspeed.zero_stage",
        "precision": "deepspeed.precision",
    }
    for field, name in names.items():
        saved, wanted = getattr(state, field), getattr(expected, field)
        if saved != wanted:
            raise UseError(
                f"{checkpoint} cannot be resumed: {name} was {saved}, now it is {wanted}; "
                "resume with what it was, or start a new run with another train.run"
            )


def gather_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The model's weights and buffers on rank 0 as float32 CPU tensors (integers as they are); {} on other ranks.

    All ranks call this together. ZeRO-3's shards are brought together one parameter at a time.
    """
    rank = torch.distributed.get_rank()
    weights: dict[str, Tensor] = {}
    for name, tensor in [*engine.module.named_parameters(), *engine.module.named_buffers()]:
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if rank == 0:
                plain = tensor.detach().cpu()
                weights[name] = (plain.float() if plain.is_floating_point() else plain).clone().contiguous()
    return weights


def _remove_old(run: Path, state: RunState, keep: int) -> None:
    best = checkpoint_folder(run, state.best_step)
    for folder in list_checkpoints(run)[: -max(1, keep)]:
        if folder != best:
            shutil.rmtree(folder)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
