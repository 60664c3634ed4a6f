"""What the processes of `benchmarks/claims/knee.py` do: train the trunk to a point, and branch from there.

The trainer does not resume a run with another batch size, since the rest of an epoch would have samples that were there
already. A branch therefore is no run: it takes weights and optimizer state of the checkpoint, begins a fresh epoch in
an order of its own seed, and leaves nothing behind but its losses.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.config import Recipe, recipe_from_dict
from dist_train.data.features import FeatureEvalLoader, FeatureStore
from dist_train.data.loader import Batch, EvalLoader
from dist_train.data.manifest import Manifest
from dist_train.data.plan import choose_streams
from dist_train.data.targets import TagTargets
from dist_train.data.tokenizer import TagTokenizer
from dist_train.models.saved import checkpoint_folder, find_damage, read_class_names, read_weights
from dist_train.place import Place
from dist_train.train.checkpoint import load_optimizer
from dist_train.train.engine import init_process_group, leave_process_group, torch_device
from dist_train.train.evaluations import evaluate_split
from dist_train.train.features import feature_eval_loader, feature_train_loader, prepare_features
from dist_train.train.inputs import build_tokenizer, read_shard_set, tag_targets, train_loader
from dist_train.train.loop import train
from dist_train.train.setup import build_step, initial_model, without_auto
from dist_train.train.step import TrainStep

TAIL = 4
"""The mean training loss is that of the last 1 / TAIL of a branch's samples."""


def stage_folder(trunk: Recipe, step: int) -> Path:
    """Where the checkpoint of the trunk at a step is kept: beside its run folder, as the run removes its older ones."""
    return Path(trunk.train.run).parent / f"stage-{step:08d}"


def is_kept(trunk: Recipe, step: int) -> bool:
    """Whether that checkpoint is there, whole and undamaged."""
    folder = stage_folder(trunk, step)
    return folder.is_dir() and find_damage(folder) is None


def work(point: dict[str, Any]) -> Any:
    """In the child: `measure_branch` of a point that names a batch, else `train_trunk`."""
    return measure_branch(point) if "batch" in point else train_trunk(point)


def train_trunk(point: dict[str, Any]) -> bool:
    """Train the trunk {recipe, step} to a step, from where it was, and keep the checkpoint. Returns whether it came so
    far; asked to stop, it has saved and did not."""
    trunk, step = recipe_from_dict(point["recipe"]), point["step"]
    if is_kept(trunk, step):
        return True
    train(replace(trunk, train=replace(trunk.train, stop_after_steps=step)), "auto")
    reached = checkpoint_folder(Path(trunk.train.run), step)
    if not reached.is_dir():
        return False
    kept = stage_folder(trunk, step)
    temporary = kept.with_suffix(".tmp")
    for former in (temporary, kept):
        shutil.rmtree(former, ignore_errors=True)
    shutil.copytree(reached, temporary)
    temporary.rename(kept)
    return True


def branch_recipe(trunk: Recipe, batch: int, seed: int) -> Recipe:
    """What a branch is trained by. Its seed's order, cut into as many streams as at the smallest batch, gives the same
    samples in the same order whatever the batch; seed 0 is not the trunk's."""
    streams = choose_streams(trunk.train.batch_size, trunk.data.streams)
    run = str(Path(trunk.train.run).parent / "branches")
    train = replace(trunk.train, batch_size=batch, seed=trunk.train.seed + 1 + seed, run=run, noise_every=0)
    return replace(trunk, data=replace(trunk.data, streams=streams), train=train)


def measure_branch(point: dict[str, Any]) -> dict[str, float | None]:
    """Branch from a checkpoint, {recipe, step, batch, seed, rate, samples}, and measure.

    recipe: the trunk's. samples: of the branch, 0 to measure the checkpoint itself. Returns val_loss, of the whole of
    val at the end, and train_loss, of the last quarter of the samples; None for what is not finite.
    """
    trunk, at = recipe_from_dict(point["recipe"]), point["step"]
    steps = point["samples"] // point["batch"]
    losses: list[Tensor] = []
    with _branch(trunk, at, point["batch"], point["seed"]) as branch:
        with closing(branch.batches()) as batches:
            for number in range(at, at + steps):
                losses.append(branch.step(batches, point["rate"], number))
        tail = torch.stack(losses[-max(1, steps // TAIL) :]).double().mean().item() if losses else None
        # After a loss that is no number no weight is one.
        val = branch.val_loss() if tail is None or math.isfinite(tail) else None
    return {"val_loss": _finite(val), "train_loss": _finite(tail)}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass
class _Branch:
    """What makes steps from a checkpoint on. consumed: where in the run its samples begin."""

    recipe: Recipe
    place: Place
    manifest: Manifest
    tokenizer: TagTokenizer | None
    targets: TagTargets | None
    features: FeatureStore | None
    step: TrainStep
    consumed: int

    def batches(self) -> Generator[Batch, None, None]:
        """Its micro-batches, without end."""
        if self.features is not None:
            yield from feature_train_loader(self.features, self.recipe, self.manifest, self.place, self.consumed)
        else:
            yield from train_loader(self.recipe, self.manifest, self.place, self.tokenizer, self.consumed, self.targets)

    def val_loss(self) -> float:
        """Mean loss over the whole of val: cross-entropy, or binary cross-entropy of tags, whatever is trained by."""
        loader: EvalLoader | FeatureEvalLoader
        if self.features is not None:
            loader = feature_eval_loader(self.features, self.recipe, self.manifest, self.place, "val")
        else:
            loader = EvalLoader(
                self.recipe.data,
                self.manifest,
                "val",
                self.place,
                batch_size=self.recipe.train.eval_batch_size,
                tokenizer=self.tokenizer,
                tag_targets=self.targets,
            )
        step = self.step
        return evaluate_split(loader, step.engine, step.forward, self.recipe.train.threshold, None).loss


@contextmanager
def _branch(trunk: Recipe, at: int, batch: int, seed: int) -> Iterator[_Branch]:
    """The branch of the trunk at a step, with its weights and optimizer state."""
    checkpoint = stage_folder(trunk, at)
    place = init_process_group(trunk.train.timeout_s)
    done = False
    try:
        manifest = read_shard_set(trunk)
        recipe = without_auto(branch_recipe(trunk, batch, seed), torch_device(place), place.world_size, checkpoint)
        tokenizer = build_tokenizer(recipe, Path(trunk.train.run))
        outputs = read_class_names(checkpoint)
        start = replace(recipe, model=replace(recipe.model, weights="none"))  # those it began with may be gone
        model, _ = initial_model(start, outputs, tokenizer.vocab_size if tokenizer else 0)
        model.load_state_dict(read_weights(checkpoint))
        features = prepare_features(recipe, model, manifest, place) if recipe.data.feature_cache else None
        step = build_step(model, recipe, place, [info.count for info in manifest.classes])
        load_optimizer(step.engine, checkpoint)
        samples = manifest.split("train").samples
        fresh_epoch = -(-at * trunk.train.batch_size // samples) * samples
        yield _Branch(recipe, place, manifest, tokenizer, tag_targets(recipe, outputs), features, step, fresh_epoch)
        step.engine.destroy()
        done = True
    finally:
        if place.device_id is not None and (done or place.world_size == 1):
            leave_process_group()
