"""A training step measured in this process: the child's end of the benchmark `step`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed.energy import ENOUGH_S, EnergyMeter, joules_per_step
from benchmarks.speed.memory import limit_memory
from benchmarks.speed.own_step import OwnStep, saved_activations_mb, synthetic_batch
from benchmarks.speed.step import PAPER_CLASSES, SYNTHETIC_VOCABULARY
from benchmarks.speed.timing import step_figures, timed
from dist_train.config import Recipe, recipe_from_dict
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import micro_batch_of
from dist_train.data.tokenizer import TagTokenizer
from dist_train.errors import UseError
from dist_train.place import Place
from dist_train.train.engine import compile_mode, init_process_group, torch_device
from dist_train.train.inputs import build_tokenizer
from dist_train.train.meters import (
    device_peak,
    matmul_rate,
    memory_figures,
    outside_torch_mb,
    peak_resident_mb,
    synchronize,
)
from dist_train.train.precision import compute_dtype
from dist_train.train.setup import with_normalisation


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """The row of a point. point: recipe, arm, warmup, steps, memory_limit (bytes, 0 for none)."""
    limit_memory(point["memory_limit"])
    recipe = recipe_from_dict(point["recipe"])
    try:
        with ExitStack() as let_go:
            row = _measure(recipe, point["arm"], point["warmup"], point["steps"], let_go)
    except torch.OutOfMemoryError:
        row = {"out_of_memory": True}
    except RuntimeError as error:
        if not any(words in str(error) for words in ("can't allocate memory", "could not create a memory")):
            raise
        row = {"out_of_memory": True}
    return row | {"peak_resident_mb": round(peak_resident_mb(), 1)}


def _measure(recipe: Recipe, arm: str, warmup: int, steps: int, let_go: ExitStack) -> dict[str, Any]:
    place = init_process_group()
    if place.world_size != 1:
        raise UseError("benchmarks step measures one device; start it without a launcher")
    if recipe.data.labels != "class":
        raise UseError("benchmarks measure models of classes: use data.labels class")
    device = torch_device(place)
    micro_batch = micro_batch_of(recipe.train.batch_size, 1, recipe.train.micro_batch_size)
    batches: Iterator[Batch]
    loaded: dict[str, float] = {}
    if arm == "synthetic":
        classes, vocabulary = PAPER_CLASSES, SYNTHETIC_VOCABULARY if recipe.model.text_tokens else 0
        batches = repeat(synthetic_batch(recipe, micro_batch, classes, device))
    else:
        tokenizer = build_tokenizer(recipe, Path(recipe.train.run))
        vocabulary = tokenizer.vocab_size if tokenizer else 0
        batches, classes, loaded = load(recipe, place, tokenizer)
    accumulation = recipe.train.batch_size // micro_batch
    if arm == "loader":
        times = timed(lambda _: [next(batches) for _ in range(accumulation)], warmup, steps, device)
        return step_figures(times, recipe.train.batch_size) | memory_figures(device) | loaded

    own = let_go.enter_context(closing(OwnStep(recipe, place, classes, vocabulary)))
    graphs = own.train_step.graphs
    warmup = max(warmup, 2 if graphs else 0)  # the first step is eager, the second records
    energy = EnergyMeter(device)

    def step(number: int) -> None:
        if number == warmup:
            own.meter.reset()  # the time and the memory of the steps alone
            energy.start()
        own(batches)

    times = timed(step, warmup, steps, device)
    joules = energy.read()
    figures = step_figures(times, recipe.train.batch_size)
    figures |= {"data_wait_share": round(own.meter.data_wait() / sum(times), 4)} | memory_figures(device) | loaded
    figures["memory_mb"] = max(figures["memory_mb"], round(own.meter.recorded_mb, 1))
    figures |= {"matrix_products": own.products, "compile": compile_mode(recipe, device, place.world_size)}
    if joules is not None and sum(times) < ENOUGH_S:
        each = joules_per_step(lambda: own(batches), float(np.median(times)), energy, device)
        joules = None if each is None else steps * each
    # What follows takes memory of its own.
    saved_mb = saved_activations_mb(own.engine.module, own.forward, next(batches))
    figures |= {"saved_activations_mb": saved_mb, "parameters": own.parameters}
    figures["gflops_per_image"] = round(own.flops / 1e9, 3)
    figures |= utilisation(recipe, own.flops, float(np.median(times)), device)
    figures["joules_per_image"] = None if joules is None else round(joules / (steps * recipe.train.batch_size), 4)
    return figures | ({"no_energy": energy.absent} if energy.absent else {})


def load(
    recipe: Recipe, place: Place, tokenizer: TagTokenizer | None = None
) -> tuple[Iterator[Batch], int, dict[str, float]]:
    """The recipe's training batches, the classes of its set, and what loading takes: first_batch_s, from the loader to
    its first batch, and on a GPU dali_mb."""
    device = torch_device(place)
    manifest = read_manifest(recipe.data.shards)
    outside = outside_torch_mb(device) if device.type == "cuda" else 0.0
    begin = time.perf_counter()
    loader = TrainLoader(
        with_normalisation(recipe).data,
        manifest,
        place,
        batch_size=recipe.train.batch_size,
        micro_batch=micro_batch_of(recipe.train.batch_size, 1, recipe.train.micro_batch_size),
        seed=recipe.train.seed,
        tokenizer=tokenizer,
    )
    batches = iter(loader)
    first = next(batches)  # the pipeline has then all memory that it needs for images like these
    synchronize(device)
    figures = {"first_batch_s": round(time.perf_counter() - begin, 3)}
    if device.type == "cuda":
        figures["dali_mb"] = round(outside_torch_mb(device) - outside, 1)
    return chain([first], batches), len(manifest.classes), figures


def utilisation(recipe: Recipe, flops: float, step_s: float, device: torch.device) -> dict[str, float | None]:
    """MFU of a step of `step_s` seconds: of the matrix product's rate measured now, and of the data sheet's."""
    dtype = compute_dtype(recipe.deepspeed)
    rate = flops * recipe.train.batch_size / step_s
    return {
        "mfu_of_matmul": round(rate / matmul_rate(device, dtype), 4),
        "mfu_of_peak": round(rate / device_peak(device, dtype), 4) if device.type == "cuda" else None,
    }
