"""Ranks that train every family of timm through DeepSpeed, job after job in one process, and write the losses."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dist_train.cli import parse_recipe
from dist_train.config import Recipe
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.models.build import build_model
from dist_train.place import Place
from dist_train.train.engine import init_process_group
from dist_train.train.setup import build_step
from tests.harness import CLASSES
from tests.models.timm_families import FAMILIES

STEPS, BATCH = 3, 8


def recipe_of(shards: Path, name: str, arguments: list[str]) -> Recipe:
    """A small recipe for the family, changed by the arguments."""
    base = {
        "data.shards": shards,
        "data.image_size": FAMILIES[name].image_size,
        "data.crop_margin": 4,
        "data.shuffle_window": 16,
        "data.threads": 1,
        "model.backbone": name,
        "model.head_init": "mean",
        "train.batch_size": BATCH,
        "optim.lr": 0.05,
    }
    return parse_recipe([*(f"--{key}={value}" for key, value in base.items()), *arguments])[0]


def losses_of(recipe: Recipe, place: Place) -> list[float]:
    """The losses of the global batch at each step, from the same initial model wherever it is called."""
    torch.manual_seed(5)
    model, _ = build_model(recipe.model, recipe.data.image_size, CLASSES)
    batches = iter(
        TrainLoader(
            recipe.data,
            read_manifest(recipe.data.shards),
            place,
            batch_size=BATCH,
            micro_batch=BATCH // place.world_size,
            seed=0,
        )
    )
    step = build_step(model, recipe, place, [12, 6, 4, 2])
    losses = []
    for number in range(STEPS):
        loss = step(batches, recipe.optim.lr, number)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / place.world_size)
    step.engine.destroy()
    return losses


def train_families(shards: Path, jobs: dict[str, tuple[str, list[str]]], output: Path) -> None:
    """What each rank does: jobs by name are a family and arguments of `dist-train train`."""
    place = init_process_group()
    losses = {job: losses_of(recipe_of(shards, *what), place) for job, what in jobs.items()}
    if place.rank == 0:
        output.write_text(json.dumps(losses))
