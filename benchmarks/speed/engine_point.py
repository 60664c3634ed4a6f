"""An engine's step beside a bare loop's, measured in this process: the child's end of the benchmark `engine`.

The bare loop, our engine (a replica at ZeRO 0, DeepSpeed's with our settings above) and an engine as DeepSpeed
configures itself take turns at every step, so that whatever else the machine does meets all of them.

The arm `host` does so with a model too small to compute anything: what is left is the host's own time for a step of
training, all of it (`TrainStep`), which is what bounds small batches and small models on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count, repeat
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.engine import HOST_BATCH, HOST_SIZE, PHASES
from dist_train.config import ModelConfig, Recipe, ZeroStage
from dist_train.data.loader import Batch
from dist_train.models.backbones import TokenTransformer, ViTShape
from dist_train.models.build import Classifier, build_model
from dist_train.models.heads import CLSHead
from dist_train.place import Place
from dist_train.train.engine import (
    build_engine,
    build_optimizer,
    deepspeed_settings,
    gather_whole_blocks,
    init_process_group,
    torch_device,
)
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.step import TrainStep, make_forward

Step = Callable[[Tensor, Tensor], dict[str, float]]
"""One step on images and labels; returns the milliseconds of each phase."""

CLASSES = 40
HOST_SHAPE = ViTShape("host", patch=16, dim=24, depth=12, heads=2)
# What an engine's step is made of beyond the model: operators as torch's profiler calls them, by their beginnings.
SPENDING = {
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "norms": ("aten::linalg_vector_norm", "aten::div_", "aten::mul_", "aten::isfinite"),
    "update": ("aten::_fused_", "aten::_foreach_"),
    "collectives": ("c10d::", "gloo:", "nccl:"),
}


# What DeepSpeed does by itself where our configuration does something else: one of them turned back at a time.
TURNED_BACK: dict[str, dict[str, Any]] = {
    "bucket sizes": {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000},
    "contiguous gradients": {"contiguous_gradients": True},
    "overlap": {"overlap_comm": True},
    "fused optimizer": {},
}


def measure(point: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one combination: the loops in turns."""
    place = init_process_group()
    if point["arm"] == "host":
        return [measure_host(point, place)]
    recipe = make_recipe(point["backbone"], point["micro_batch"], point["zero_stage"])
    images = torch.randn(point["micro_batch"], 3, point["size"], point["size"])
    labels = torch.arange(point["micro_batch"]) % CLASSES

    def model() -> Classifier:
        torch.manual_seed(0)
        return build_model(recipe.model, point["size"], CLASSES, 0)[0]

    millions = sum(parameter.numel() for parameter in model().parameters()) / 1e6
    loops = {
        "bare": bare_loop(model(), recipe),
        "ours": engine_loop(build_engine(model(), recipe, place, point["micro_batch"])),
    }
    if point["arm"] == "settings":
        for what, theirs in TURNED_BACK.items():
            mine = model()
            optimizer = None
            if what == "fused optimizer":
                optimizer = torch.optim.SGD(mine.parameters(), recipe.optim.lr, recipe.optim.momentum)
            loops[what] = engine_loop(changed_engine(mine, recipe, 1, point["micro_batch"], theirs, optimizer))
    else:
        loops["default"] = engine_loop(default_engine(model(), recipe, point["micro_batch"]))
    turns = take_turns(loops, images, labels, point["pairs"], point["seconds"])
    where = {"zero_stage": point["zero_stage"], "micro_batch": point["micro_batch"], "turns": len(turns["bare"])}
    if point["arm"] == "settings":
        return [
            where | {"turned_back": what} | figures(turns, millions, {"ours": "ours", "it": what})
            for what in TURNED_BACK
        ]
    spent = {which: spending(partial(step, images, labels)) for which, step in loops.items()}
    spent_on = {
        f"{which}_{what}_ms_per_million": round((spent[which][what] - spent["bare"][what]) / millions, 3)
        for which in ("ours", "default")
        for what in SPENDING
    }
    return [where | figures(turns, millions, {"ours": "ours", "default": "default"}) | spent_on]


def measure_host(point: dict[str, Any], place: Place) -> dict[str, Any]:
    """The row of a ZeRO stage: a whole step of ours over a bare one, and one of DeepSpeed's engine without anything of
    training around it, on one thread."""
    torch.set_num_threads(1)
    recipe = make_recipe("vit_tiny_patch16", HOST_BATCH, point["zero_stage"])
    batch = Batch(
        torch.randn(HOST_BATCH, 3, HOST_SIZE, HOST_SIZE),
        torch.arange(HOST_BATCH),
        torch.ones(HOST_BATCH),
        None,
        None,
        np.arange(HOST_BATCH),
    )

    def model() -> Classifier:
        torch.manual_seed(0)
        transformer = TokenTransformer(HOST_SHAPE, HOST_SIZE, features="pooled", dropout=0.0, norm_eps=1e-6)
        return Classifier(transformer, CLSHead(HOST_SHAPE.dim, HOST_SHAPE.depth, CLASSES, 1e-6), None, True)

    device = torch_device(place)
    engine = build_engine(model(), recipe, place, HOST_BATCH)
    forward, objective = make_forward(engine, recipe, device), Objective(recipe.optim, [1] * CLASSES, device)
    train_step = TrainStep(engine, forward, objective, recipe, 1, place.rank, StepMeter(device, 1.0, 1.0))
    batches, numbers = repeat(batch), count()

    def ours(*_: Tensor) -> dict[str, float]:
        begin = time.perf_counter()
        train_step(batches, recipe.optim.lr, next(numbers))
        return {"step": 1000 * (time.perf_counter() - begin)}

    loops = {
        "bare": bare_loop(model(), recipe),
        "ours": ours,
        "default": engine_loop(default_engine(model(), recipe, HOST_BATCH)),
    }
    for _ in range(5):  # the first steps allocate, and look at the precision
        ours()
    turns = take_turns(loops, batch.images, batch.labels, point["pairs"], point["seconds"])
    totals = {which: [sum(turn.values()) for turn in its] for which, its in turns.items()}
    ratios = {
        which: [mine / bare for mine, bare in zip(its, totals["bare"], strict=True)] for which, its in totals.items()
    }
    return {
        "zero_stage": point["zero_stage"],
        "micro_batch": HOST_BATCH,
        "turns": len(totals["bare"]),
        "bare_ms": round(statistics.median(totals["bare"]), 2),
        "ours_ratio": round(statistics.median(ratios["ours"]), 4),
        "default_ratio": round(statistics.median(ratios["default"]), 4),
    }


def take_turns(
    loops: dict[str, Step], images: Tensor, labels: Tensor, pairs: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of each phase of each loop's steps: `pairs` of them at least, more as far as `seconds` allow."""
    turns: dict[str, list[dict[str, float]]] = {which: [] for which in loops}
    for step in loops.values():  # the first step allocates
        step(images, labels)
    end = time.perf_counter() + seconds
    while len(turns["bare"]) < pairs or time.perf_counter() < end:
        # Each begins a turn equally often, and none follows itself: it would find its caches warm.
        first = len(turns["bare"]) % len(loops)
        for which in [*list(loops)[first:], *list(loops)[:first]]:
            turns[which].append(loops[which](images, labels))
    return turns


def spending(step: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of one step in each kind of operator of SPENDING, their own time on the host."""
    with profile(activities=[ProfilerActivity.CPU]) as traced:
        step()
    operators = traced.key_averages()
    return {
        what: sum(operator.self_cpu_time_total for operator in operators if operator.key.startswith(names)) / 1000
        for what, names in SPENDING.items()
    }


def figures(turns: dict[str, list[dict[str, float]]], millions: float, named: dict[str, str]) -> dict[str, float]:
    """Medians over the turns of ratios and differences to the bare loop's step of the same turn.

    named: the prefix of the keys of a loop's figures, and which loop.
    """
    totals = {which: [sum(turn.values()) for turn in its] for which, its in turns.items()}
    row: dict[str, float] = {"bare_ms": round(statistics.median(totals["bare"]), 1)}
    for prefix, which in named.items():
        pairs = list(zip(totals[which], totals["bare"], strict=True))
        row[f"{prefix}_ratio"] = round(statistics.median(mine / bare for mine, bare in pairs), 4)
        excess = statistics.median(mine - bare for mine, bare in pairs)
        row[f"{prefix}_excess_ms_per_million"] = round(excess / millions, 3)
        for phase in PHASES:
            differences = [mine[phase] - bare[phase] for mine, bare in zip(turns[which], turns["bare"], strict=True)]
            row[f"{prefix}_{phase}_ms_per_million"] = round(statistics.median(differences) / millions, 3)
    return row


def make_recipe(backbone: str, micro_batch: int, zero_stage: ZeroStage) -> Recipe:
    """SGD with momentum at a rate that changes next to nothing."""
    recipe = Recipe()
    return replace(
        recipe,
        model=ModelConfig(backbone=backbone, head="cls", head_init="default"),
        optim=replace(recipe.optim, lr=1e-6),
        train=replace(recipe.train, batch_size=micro_batch),
        deepspeed=replace(recipe.deepspeed, zero_stage=zero_stage),
    )


def default_engine(model: nn.Module, recipe: Recipe, micro_batch: int) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed with torch's plain optimizer and nothing set but what decides the result."""
    wanted = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "zero_allow_untested_optimizer",
    )
    ours = deepspeed_settings(recipe, 1, micro_batch, sum(parameter.numel() for parameter in model.parameters()))
    settings = {key: value for key, value in ours.items() if key in wanted}
    optim = recipe.optim
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay),
        config=settings | {"zero_optimization": {"stage": recipe.deepspeed.zero_stage}, "steps_per_print": 1 << 30},
    )[0]


def changed_engine(
    model: Classifier,
    recipe: Recipe,
    world_size: int,
    micro_batch: int,
    changes: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    whole_blocks: bool = True,
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed with our settings but for these of ZeRO's, and with our optimizer unless another is given.

    whole_blocks: whether ZeRO 3 gathers the parameters of a block together, as in our engine.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = deepspeed_settings(recipe, world_size, micro_batch, parameters)
    settings["zero_optimization"] |= changes
    if recipe.deepspeed.zero_stage == 3 and whole_blocks:
        gather_whole_blocks(model)
    optimizer = optimizer or build_optimizer(recipe.optim, model)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def bare_loop(model: Classifier, recipe: Recipe) -> Step:
    """A step of PyTorch alone, with the optimizer that our engine has."""
    return timed_step(model, lambda loss: loss.backward(), updating(build_optimizer(recipe.optim, model)))


def updating(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """What follows a backward pass."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def engine_loop(engine: deepspeed.DeepSpeedEngine) -> Step:
    """A step of an engine."""
    return timed_step(engine, engine.backward, engine.step)


def timed_step(model: nn.Module, backward: Callable[[Tensor], Any], update: Callable[[], Any]) -> Step:
    """The step that these make."""

    def step(images: Tensor, labels: Tensor) -> dict[str, float]:
        times = [time.perf_counter()]
        loss = functional.cross_entropy(model(images), labels)
        times.append(time.perf_counter())
        backward(loss)
        times.append(time.perf_counter())
        update()
        times.append(time.perf_counter())
        return {phase: 1000 * (times[i + 1] - times[i]) for i, phase in enumerate(PHASES)}

    return step
