"""The first steps of a run without the run: for what is to be known before it, such as what it will cost."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dist_train.config import Recipe
from dist_train.data.loader import Batch
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.data.tokenizer import TagTokenizer
from dist_train.errors import WorkError, written
from dist_train.place import Place
from dist_train.recipe import check
from dist_train.train.engine import init_process_group, torch_device
from dist_train.train.inputs import begin_outputs, begin_tokenizer, check_same_set, tag_targets, train_loader
from dist_train.train.micro_batch import with_micro_batch
from dist_train.train.ranks import from_rank_zero
from dist_train.train.record import start_console_log
from dist_train.train.schedule import count_steps
from dist_train.train.setup import build_step, initial_model, run_in_a_line, without_auto
from dist_train.train.step import TrainStep

log = logging.getLogger(__name__)


@dataclass
class Rehearsal:
    """What makes the steps. recipe: with a temporary folder for train.run, which goes at the end."""

    recipe: Recipe
    place: Place
    manifest: Manifest
    tokenizer: TagTokenizer | None
    train_step: TrainStep
    batches: Iterator[Batch]
    total_steps: int
    """Of the whole run."""
    outputs: list[str]
    """Names of what the model predicts."""


@contextmanager
def rehearsal(recipe: Recipe) -> Iterator[Rehearsal]:
    """All that makes a run's steps, from its starting weights and its first sample on; all ranks call this together.

    Neither the run folder nor data.feature_cache is written or looked at. Raises UseError for what cannot be, and
    WorkError where a step does not fit into a GPU.
    """
    place = init_process_group(recipe.train.timeout_s)
    start_console_log(place.rank)
    done = False
    try:
        with _ending_at_sigterm(), _temporary_run(recipe, place) as temporary:
            manifest = read_manifest(recipe.data.shards)
            check_same_set(manifest, recipe.data.shards, place)
            check(temporary, place.world_size, torch_device(place).type, manifest)
            if recipe.data.feature_cache:  # its first epoch is of whole images, as here
                without: dict[str, Any] = {"feature_cache": None}
                recipe = replace(recipe, data=replace(recipe.data, **without))
            resolved = without_auto(recipe, torch_device(place), place.world_size)
            log.info("%s", run_in_a_line(resolved, manifest, place))
            yield _built(replace(resolved, train=temporary.train), place, manifest)
        done = True
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"a step does not fit into the GPU's memory ({str(error).splitlines()[0][:200]}); lower "
            "train.micro_batch_size, set model.checkpoint_blocks, or raise deepspeed.zero_stage"
        ) from None
    finally:
        if place.device_id is not None and (done or place.world_size == 1):
            torch.distributed.destroy_process_group()


def _built(recipe: Recipe, place: Place, manifest: Manifest) -> Rehearsal:
    tokenizer = begin_tokenizer(recipe, manifest, place, None)
    outputs = begin_outputs(recipe, manifest, place, None)
    vocabulary = tokenizer.vocab_size if tokenizer else 0
    recipe = with_micro_batch(recipe, place, len(outputs), vocabulary)
    model, _ = initial_model(recipe, outputs, vocabulary)
    counts = [info.count for info in manifest.classes]
    return Rehearsal(
        recipe,
        place,
        manifest,
        tokenizer,
        build_step(model, recipe, place, counts),
        iter(train_loader(recipe, manifest, place, tokenizer, targets=tag_targets(recipe, outputs))),
        count_steps(recipe.train.epochs, manifest.split("train").samples, recipe.train.batch_size),
        outputs,
    )


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the process as Ctrl-C does: with nothing left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _temporary_run(recipe: Recipe, place: Place) -> Iterator[Recipe]:
    """The recipe with another run folder, which all ranks see as they would see its own: it lies beside that."""
    above = next(folder for folder in Path(recipe.train.run).absolute().parents if folder.is_dir())

    def make() -> str:
        with written(above, "choose another train.run"):
            return tempfile.mkdtemp(prefix=".rehearsal-", dir=above)

    folder = from_rank_zero(make, place)
    try:
        yield replace(recipe, train=replace(recipe.train, run=folder))
    finally:
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
