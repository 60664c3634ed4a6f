"""Ranks that train through DeepSpeed, job after job in one process, and write the losses of each."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dist_train.cli import parse_recipe
from dist_train.config import Recipe
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.tokenizer import TagTokenizer
from dist_train.models.build import Classifier, build_model
from dist_train.models.names import VIT_SIZES
from dist_train.place import Place
from dist_train.train.engine import init_process_group
from dist_train.train.setup import build_step
from tests.harness import CLASSES
from tests.train.forked_ranks import run_on

STEPS, BATCH = 50, 8
NARROW = (64, 2, 2)  # channels, blocks and heads that vit_tiny has here, so that thousands of steps take minutes
DEEPER = (32, 5, 2)  # and vit_small, where it matters what lies between the first block and the last
TAGS = ["red", "hair", "cat", "ears", "smile"]
MODELS = {"cls": [], "ifa": ["--model.head=ifa"], "vilt": ["--model.text_tokens=4"]}

Jobs = dict[str, list[str]]  # by a name of the test's own: arguments of `dist-train train`


def recipe_of(shards: Path, arguments: list[str]) -> Recipe:
    """A small recipe, changed by the arguments."""
    base = {
        "data.shards": shards,
        "data.image_size": 32,
        "data.crop_margin": 4,
        "data.shuffle_window": 16,
        "data.threads": 1,
        "model.backbone": "vit_tiny_patch16",
        "model.head_init": "mean",
        "train.batch_size": BATCH,
    }
    return parse_recipe([*(f"--{key}={value}" for key, value in base.items()), *arguments])[0]


def rate_of(recipe: Recipe, step: int) -> float:
    """Up for ten steps, then down, so that a rate that is not heeded shows."""
    return recipe.optim.lr * min((step + 1) / 10, (STEPS - step) / (STEPS - 10))


def start(recipe: Recipe) -> tuple[Classifier, TagTokenizer | None]:
    """The same initial model wherever it is called."""
    tokenizer = TagTokenizer("tags", recipe.model.text_tokens, TAGS, False) if recipe.model.text_tokens else None
    torch.manual_seed(5)
    model, _ = build_model(recipe.model, 32, CLASSES, tokenizer.vocab_size if tokenizer else 0)
    return model, tokenizer


def loader_of(recipe: Recipe, place: Place, micro_batch: int, tokenizer: TagTokenizer | None) -> TrainLoader:
    manifest = read_manifest(recipe.data.shards)
    return TrainLoader(
        recipe.data, manifest, place, batch_size=BATCH, micro_batch=micro_batch, seed=0, tokenizer=tokenizer
    )


def losses_through_deepspeed(
    shards: Path, jobs: Jobs, world_size: int, folder: Path, steps: int = STEPS
) -> dict[str, list[float]]:
    """The losses of the global batch at each step of each job, by `world_size` real processes."""
    run_on(world_size, folder, train_jobs, shards, jobs, steps, folder / "losses.json")
    return json.loads((folder / "losses.json").read_text())


def run_job(recipe: Recipe, place: Place, steps: int) -> list[float]:
    model, tokenizer = start(recipe)
    micro_batch = recipe.train.micro_batch_size or BATCH // place.world_size
    batches = iter(loader_of(recipe, place, micro_batch, tokenizer))
    train_step = build_step(model, recipe, place, [12, 6, 4, 2])
    losses = []
    for step in range(steps):
        loss = train_step(batches, rate_of(recipe, step), step)
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / place.world_size)
    train_step.engine.destroy()
    return losses


def train_jobs(shards: Path, jobs: Jobs, steps: int, output: Path) -> None:
    """What each rank does."""
    VIT_SIZES["tiny"], VIT_SIZES["small"] = NARROW, DEEPER
    place = init_process_group()
    losses = {name: run_job(recipe_of(shards, arguments), place, steps) for name, arguments in jobs.items()}
    if place.rank == 0:
        output.write_text(json.dumps(losses))
