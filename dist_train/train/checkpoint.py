"""Checkpoints of a run: complete and undamaged, or not used.

RUN/checkpoints/step-00000123/ holds
    state.json              where the run stood: step, samples consumed, seed, manifest digest, best result; the names
                            of the classes (or tags, and the thresholds for them that were chosen on val, if it was
                            evaluated there); the recipe; fp16's loss scale; a SHA-256 of all that
    weights.safetensors     the weights, float32, names as in the model
    optimizer.safetensors   the optimizer's state by KEY/NAME of the parameter
    extra.safetensors       the averaged weights, if the run has such (train.ema), likewise
    checksums.json          size and SHA-256 of each of the others
and RUN/checkpoints/latest names the newest. Nothing in it depends on the number of ranks, the ZeRO stage or the
precision, and nothing is a pickle. A checkpoint is written under a temporary name, synced, and renamed. An evaluation
on val changes state.json alone afterwards, so that a run which is killed in it continues from there. Random numbers
need no state: order and augmentation are functions of the position, dropout is seeded by the step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.config import Recipe, recipe_to_dict
from dist_train.data.manifest import Manifest
from dist_train.errors import UseError, WorkError
from dist_train.files import sync, write_atomically
from dist_train.models.saved import (
    CHECKSUMS_NAME,
    EXTRA_NAME,
    OPTIMIZER_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    checkpoint_folder,
    choose_checkpoint,
    document_sha256,
    file_sha256,
    list_checkpoints,
    newest_checkpoint,
    read_document,
    read_tensors,
    read_weights,
)
from dist_train.train.engine import Engine
from dist_train.train.engine_state import gather_state, read_loss_scale, restore_loss_scale, restore_state

# Keys that change how fast a run is and what it says, and not what it learns.
_COMPUTES_NOTHING = {
    *(f"data.{key}" for key in ("shards", "cache", "cache_gb", "digest", "feature_cache", "threads", "prefetch")),
    *(f"train.{key}" for key in ("run", "eval_batch_size", "log_every", "stop_after_steps", "keep_checkpoints")),
    "train.threshold",
    *(f"train.{key}" for key in ("timeout_s", "profile_steps", "wandb_project")),
    *(f"model.{key}" for key in ("weights", "pos_resize", "head_init", "checkpoint_blocks", "compile")),
    *(f"deepspeed.{key}" for key in ("zero_stage", "offload")),
}
_SLACK = 1 << 20  # bytes that the small files and the file system's own records take beside the tensors
log = logging.getLogger(__name__)


@dataclass
class RunState:
    """Where a run stands between two optimizer steps.

    Of the best evaluation on val: best_step, -1 before any; best_top1, its top-1, or the mAP of a model that predicts
    tags; best_value, of what train.monitor names, which is in `monitor` without `auto`. evaluations_since_best: how
    many have followed it. evaluation_due: whether val is still to be evaluated at this step. seconds: that the run's
    processes took up to this step; what one of them took after its last checkpoint is not in it.
    """

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
    monitor: str = "top1"
    best_value: float | None = None
    evaluations_since_best: int = 0
    evaluation_due: bool = False
    seconds: float = field(default=0.0, compare=False)

    @classmethod
    def at_start(cls, recipe: Recipe, manifest: Manifest, world_size: int) -> RunState:
        """Before the first step of a run."""
        return cls(
            step=0,
            samples_consumed=0,
            seed=recipe.train.seed,
            batch_size=recipe.train.batch_size,
            world_size=world_size,
            zero_stage=recipe.deepspeed.zero_stage,
            precision=recipe.deepspeed.precision,
            num_classes=len(manifest.classes),
            manifest_digest=manifest.digest,
            monitor=_monitor_of(recipe),
        )


def _monitor_of(recipe: Recipe) -> str:
    if recipe.train.monitor != "auto":
        return recipe.train.monitor
    return "map" if recipe.data.labels == "tags" else "top1"


# ---------------------------------------------------------------------- reading
def checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """The undamaged checkpoint that `resume` means: none, auto (the newest), or as `choose_checkpoint`; None to start
    from the beginning.
    """
    if resume == "none":
        return None
    return newest_checkpoint(run) if resume == "auto" else choose_checkpoint(run, resume, "--resume").checkpoint


def read_state(checkpoint: Path) -> RunState:
    """The state of a checkpoint. Raises WorkError naming the file if it is damaged."""
    try:
        state = RunState(**read_document(checkpoint)["state"])
    except TypeError as error:
        raise WorkError(
            f"{checkpoint / STATE_NAME}: cannot be read ({error}); was it written by another version?"
        ) from None
    if state.best_step >= 0 and state.best_value is None:  # from before there was train.monitor
        state.best_value = state.best_top1
    return state


def load_weights(model: nn.Module, checkpoint: Path, expected: RunState, recipe: Recipe) -> RunState:
    """Put the checkpoint's weights into the model, before an engine is built around it, and return its state.

    `expected` and `recipe` are what is asked for now. Raises UseError where the checkpoint is of another run (other
    data, order of the samples, seed, batch, classes or optimizer) or of a model of another shape. Ranks, ZeRO stage and
    precision may change.
    """
    state = read_state(checkpoint)
    _check_same_run(checkpoint, state, expected, recipe)
    _check_same_model(checkpoint, model, recipe)
    model.load_state_dict(read_weights(checkpoint))
    if state.monitor != expected.monitor:  # what was best by the one says nothing of the other
        state = replace(state, monitor=expected.monitor, best_value=None, best_top1=-1.0, best_step=-1)
        state.evaluations_since_best = 0
    now = replace(state, world_size=expected.world_size, zero_stage=expected.zero_stage, precision=expected.precision)
    if now != state:
        log.info("%s was written by %s; continuing with %s", checkpoint, _topology(state), _topology(now))
    return now


def load_optimizer(engine: Engine, checkpoint: Path) -> None:
    """Put the engine back to where the checkpoint was written; its model has the weights of `load_weights`."""
    restore_state(engine, read_weights(checkpoint), read_tensors(checkpoint / OPTIMIZER_NAME))
    restore_loss_scale(engine, read_document(checkpoint)["loss_scale"])


def recipe_changes(checkpoint: Path, recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The recipe that the checkpoint was trained by, and `KEY OLD -> NEW` of each key by which that changes what is
    computed from here on. Keys that one of the two versions does not have are left out.
    """
    before, now = _recipes(checkpoint, recipe)
    return read_document(checkpoint)["recipe"], [
        f"{key} {before[key]} -> {value}"
        for key, value in now.items()
        if key not in _COMPUTES_NOTHING and key in before and before[key] != value
    ]


def _recipes(checkpoint: Path, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each SECTION.KEY was when the checkpoint was written, and what it is now."""
    both = read_document(checkpoint)["recipe"], recipe_to_dict(recipe)
    before, now = ({f"{name}.{key}": one[name][key] for name in one for key in one[name]} for one in both)
    return before, now


def _check_same_run(checkpoint: Path, state: RunState, expected: RunState, recipe: Recipe) -> None:
    names = {
        "num_classes": "classes of the shard set",
        "manifest_digest": "manifest digest of the shard set",
        "seed": "train.seed",
        "batch_size": "train.batch_size",
    }
    pairs = [(name, getattr(state, field), getattr(expected, field)) for field, name in names.items()]
    before, now = _recipes(checkpoint, recipe)
    # By these the rest of the epoch would have samples that it had already; by the optimizer its state means nothing.
    pairs += [(key, before.get(key), now[key]) for key in ("data.streams", "data.shuffle_window", "optim.name")]
    pairs.append(("data.labels", before.get("data.labels", "class"), now["data.labels"]))
    if recipe.data.labels == "tags":
        pairs += [(key, before.get(key), now[key]) for key in ("data.tag_vocabulary", "data.tag_min_count")]
    for name, saved, wanted in pairs:
        if saved != wanted:
            raise UseError(
                f"{checkpoint} cannot be resumed: {name} was {saved}, now it is {wanted}; "
                "resume with what it was, or start a new run with another train.run"
            )


def _check_same_model(checkpoint: Path, model: nn.Module, recipe: Recipe) -> None:
    """Raise UseError naming the keys by which the recipe's model has other tensors than the checkpoint's."""
    with safe_open(checkpoint / WEIGHTS_NAME, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if saved == wanted:
        return
    before, now = _recipes(checkpoint, recipe)
    shaping = [key for key in now if key.startswith("model.")]
    shaping += ["data.image_size", "data.tokenizer", "data.tag_vocabulary", "data.tag_min_count"]
    different = [f"{key} was {before.get(key)}, now it is {now[key]}" for key in shaping if before.get(key) != now[key]]
    name = min(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    shapes = f"{name} was {saved.get(name, 'not there')}, now it is {wanted.get(name, 'not there')}"
    raise UseError(
        f"{checkpoint} cannot be resumed, its model has another shape: {'; '.join(different) or shapes}; "
        "resume with what it was, or start a new run with another train.run"
    )


def _topology(state: RunState) -> str:
    return f"{state.world_size} ranks at ZeRO {state.zero_stage} in {state.precision}"


# ---------------------------------------------------------------------- writing
class CheckpointWriter:
    """Writes a run's checkpoints: all ranks copy their state to rank 0 together, a thread of rank 0 writes the files
    while training continues. One is written at a time; until then rank 0's memory holds the copy.
    """

    def __init__(self, run: Path, recipe: Recipe, class_names: list[str]) -> None:
        self._run, self._recipe, self._class_names = run, recipe, class_names
        self._rank = torch.distributed.get_rank()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # the interpreter waits for it at its end
        self._writing: Future[None] | None = None

    def save(self, engine: Engine, state: RunState, extra: dict[str, Tensor] | None = None) -> None:
        """Take the state and begin to write the checkpoint; all ranks call this together.

        extra: further tensors by name, of rank 0, that `read_extra` gives back. Of the older checkpoints the newest
        train.keep_checkpoints - 1 and the best stay; newer ones, of a past that was left, go.
        Raises WorkError on rank 0 where the former checkpoint failed or the file system has no room for this one.
        """
        self.finish()
        weights, optimizer = gather_state(engine)
        if self._rank != 0:
            return
        document = {
            "state": asdict(state),
            "classes": self._class_names,
            "recipe": recipe_to_dict(self._recipe),
            "loss_scale": read_loss_scale(engine),
        }
        files = {WEIGHTS_NAME: weights, OPTIMIZER_NAME: optimizer}
        if extra:
            files[EXTRA_NAME] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in extra.items()}
        final = checkpoint_folder(self._run, state.step)
        final.parent.mkdir(parents=True, exist_ok=True)
        _check_space(final, files)
        self._writing = self._thread.submit(self._write, final, document, files, replace(state))

    def note_evaluation(self, state: RunState, thresholds: dict[str, list[float]] | None = None) -> None:
        """Write what an evaluation came to into the checkpoint of its step, and remove what is no longer the best.

        thresholds: of the tags, for the `raw` and the `averaged` weights, that `read_thresholds` gives back. Raises
        WorkError on rank 0 where the checkpoint failed, OSError where state.json cannot be written.
        """
        self.finish()
        folder = checkpoint_folder(self._run, state.step)
        if self._rank != 0 or not folder.is_dir():  # a run that was resumed from another's checkpoint has none yet
            return
        document = read_document(folder)
        if not document["state"].get("evaluation_due"):
            return
        document["state"] = asdict(state)
        if thresholds:
            document["thresholds"] = thresholds
        write_atomically(folder / STATE_NAME, _state_file(document))
        _remove_others(self._run, state, self._recipe.train.keep_checkpoints)

    def check(self) -> None:
        """Raise WorkError if the checkpoint in the background has failed."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint in the background. Raises WorkError if it has failed."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(
        self, final: Path, document: dict[str, Any], files: dict[str, dict[str, Tensor]], state: RunState
    ) -> None:
        for left_over in final.parent.glob("step-*.tmp"):  # by a process that was killed
            shutil.rmtree(left_over)
        temporary = final.with_name(f"{final.name}.tmp")
        try:
            temporary.mkdir()
            for name, tensors in files.items():
                save_file(tensors, temporary / name)
            (temporary / STATE_NAME).write_bytes(_state_file(document))
            for name in files:  # safetensors lets only the owner read what it writes, whatever the umask
                (temporary / name).chmod((temporary / STATE_NAME).stat().st_mode)
            described = {
                name: {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
                for name in files
            }
            (temporary / CHECKSUMS_NAME).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
            shutil.rmtree(final, ignore_errors=True)  # damaged, else the run would have gone on from it
            os.replace(temporary, final)
            sync(final.parent)
            write_atomically(final.parent / "latest", f"{final.name}\n".encode())
            _remove_others(self._run, state, self._recipe.train.keep_checkpoints)
        except Exception as error:  # safetensors raises its own kinds for a full disk
            shutil.rmtree(temporary, ignore_errors=True)
            raise WorkError(
                f"{final}: the checkpoint could not be written ({error}); older ones are untouched: "
                f"see to {final.parent}, then --resume auto"
            ) from None


def leave_later_past(run: Path, step: int) -> None:
    """Remove the checkpoints behind `step` of a run that goes on from there: were it killed before its next one,
    --resume auto would take theirs for its own."""
    later = [folder for folder in list_checkpoints(run) if folder > checkpoint_folder(run, step)]
    if later:
        write_atomically(run / "checkpoints" / "latest", f"{checkpoint_folder(run, step).name}\n".encode())
    for folder in later:
        shutil.rmtree(folder)


def _state_file(document: dict[str, Any]) -> bytes:
    document = {name: value for name, value in document.items() if name != "sha256"}
    return (json.dumps(document | {"sha256": document_sha256(document)}, indent=1) + "\n").encode()


def _check_space(final: Path, files: dict[str, dict[str, Tensor]]) -> None:
    needed = _SLACK + sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise WorkError(
            f"{final.parent}: no room for {final.name}: it needs {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
            "make room or lower train.keep_checkpoints, then --resume auto"
        )


def _remove_others(run: Path, state: RunState, keep: int) -> None:
    """Remove all checkpoints but the best and the newest `keep` up to this step."""
    folders = list_checkpoints(run)
    past = [folder for folder in folders if folder <= checkpoint_folder(run, state.step)]
    kept = {*past[-max(1, keep) :], checkpoint_folder(run, state.best_step)}
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)
