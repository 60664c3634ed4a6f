"""Ranks that train through DeepSpeed, job after job in one process, and write the losses of each.

Tests call `losses_through_deepspeed`; the ranks are `python -m tests.train.deepspeed_worker JOBS OUTPUT`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from dist_train.cli import parse_recipe
from dist_train.config import Recipe
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.text import TagTokenizer
from dist_train.models.build import Classifier, build_model
from dist_train.models.names import VIT_SIZES
from dist_train.place import Place
from dist_train.train.engine import init_process_group
from dist_train.train.setup import build_step
from tests.conftest import CLASSES, REPOSITORY

STEPS, BATCH = 50, 8
NARROW = (64, 2, 2)  # channels, blocks and heads that vit_tiny has here, so that thousands of steps take minutes
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "jobs.json").write_text(json.dumps({"shards": str(shards), "steps": steps, "jobs": jobs}))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-m", __name__, str(folder / "jobs.json"), str(folder / "losses.json")]
    # Files, as a pipe that nobody reads yet would stop a rank that says much, and with it all others.
    outputs = [folder / f"rank{rank}.log" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)},
            cwd=REPOSITORY,
            stdout=outputs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]
    try:
        for rank in ranks:
            rank.wait(timeout=600)
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), outputs[0].read_text()[-3000:]
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


def main() -> None:
    VIT_SIZES["tiny"] = NARROW
    document = json.loads(Path(sys.argv[1]).read_text())
    place = init_process_group()
    losses = {
        name: run_job(recipe_of(document["shards"], arguments), place, document["steps"])
        for name, arguments in document["jobs"].items()
    }
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
