"""What one training step costs: time, throughput, data wait, memory, FLOPs, MFU and energy of one recipe on one device.

Each point is measured in a process of its own, so that its memory is its own. Three arms: `synthetic` trains on one
batch that stays on the device (the model alone), `loader` only loads, `end_to_end` does both as a run does.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.memory import free_memory
from benchmarks.own_step import OwnStep, saved_activations_mb, synthetic_batch
from benchmarks.points import environment_of_one_process
from benchmarks.result import write_result
from benchmarks.tables import describe_row
from benchmarks.timing import EnergyMeter, step_figures, timed
from dist_train.config import Recipe
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.text import TagTokenizer
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.parse import SECTIONS
from dist_train.place import Place
from dist_train.train.engine import init_process_group, torch_device
from dist_train.train.inputs import build_tokenizer
from dist_train.train.meters import (
    device_peak,
    matmul_rate,
    memory_figures,
    outside_torch_mb,
    peak_resident_mb,
    synchronize,
)
from dist_train.train.precision import compute_dtype, precision_of

Arm = Literal["synthetic", "loader", "end_to_end"]
ARMS: tuple[Arm, ...] = ("synthetic", "loader", "end_to_end")
PAPER_CLASSES = 3263  # of DAF; of a synthetic point without a shard set
SYNTHETIC_VOCABULARY = 30522  # of bert-base-uncased


def measure_steps(recipe: Recipe, arms: list[Arm], warmup: int, steps: int, name: str) -> Path:
    """Measure the arms, a process each, print a line of each and write the result; returns its path."""
    rows = []
    for arm in arms:
        rows.append(run_point(recipe, arm, warmup, steps))
        named = f"{arm}, {recipe.model.backbone} {recipe.model.head} batch {recipe.train.batch_size}"
        say(describe_row(rows[-1], named))
    return write_result("step", name, {"recipe": asdict(recipe), "warmup": warmup, "steps": steps}, rows)


def run_point(
    recipe: Recipe,
    arm: Arm,
    warmup: int,
    steps: int,
    environment: dict[str, str] | None = None,
    memory_limit: int = 0,
) -> dict[str, Any]:
    """One row, from a process of its own. Running out of memory is a result; raises WorkError for other failures.

    environment: variables to set beside this process's. memory_limit: bytes that the process may take on its device, 0
    for what there is.
    """
    limits = {"warmup": warmup, "steps": steps, "memory_limit": memory_limit}
    point = json.dumps({"recipe": asdict(recipe), "arm": arm} | limits)
    command = [sys.executable, "-m", "benchmarks.step", point]
    environment = environment_of_one_process() | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    described = describe(recipe, arm)
    # -9 is what Linux does to a process that takes more memory than there is.
    if done.returncode in (-9, 137) or (done.returncode < 0 and "bad_alloc" in done.stderr):
        return described | {"out_of_memory": True}
    if done.returncode == 0:
        return described | json.loads(done.stdout.splitlines()[-1])
    message = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    raise (UseError if done.returncode == 2 else WorkError)(f"{arm}: {message.removeprefix('error: ')}")


def describe(recipe: Recipe, arm: Arm) -> dict[str, Any]:
    """What tells one point from another."""
    return {
        "arm": arm,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "text_tokens": recipe.model.text_tokens,
        "image_size": recipe.data.image_size,
        "batch_size": recipe.train.batch_size,
        "micro_batch": recipe.train.micro_batch_size or recipe.train.batch_size,
        "precision": precision_of(recipe.deepspeed),
        "zero_stage": recipe.deepspeed.zero_stage,
        "compile": recipe.model.compile,
    }


def measure_point(recipe: Recipe, arm: Arm, warmup: int, steps: int) -> dict[str, Any]:
    """Measure one arm in this process, which holds nothing of it afterwards."""
    try:
        with ExitStack() as let_go:
            return _measure(recipe, arm, warmup, steps, let_go)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except RuntimeError as error:
        if not any(words in str(error) for words in ("can't allocate memory", "could not create a memory")):
            raise
        return {"out_of_memory": True}
    finally:
        free_memory()


def _measure(recipe: Recipe, arm: Arm, warmup: int, steps: int, let_go: ExitStack) -> dict[str, Any]:
    place = init_process_group()
    if place.world_size != 1:
        raise UseError("benchmarks step measures one device; start it without a launcher")
    device = torch_device(place)
    micro_batch = recipe.train.micro_batch_size or recipe.train.batch_size
    if recipe.train.batch_size % micro_batch:
        raise UseError(
            f"train.micro_batch_size {micro_batch} does not divide train.batch_size {recipe.train.batch_size}"
        )
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
    figures["matrix_products"] = own.products
    # What follows takes memory of its own.
    saved_mb = saved_activations_mb(own.engine.module, own.forward, next(batches))
    figures |= {"saved_activations_mb": saved_mb, "parameters": own.parameters}
    figures["gflops_per_image"] = round(own.flops / 1e9, 3)
    figures |= utilisation(recipe, own.flops, float(np.median(times)), device)
    figures["joules_per_image"] = None if joules is None else round(joules / (steps * recipe.train.batch_size), 4)
    return figures


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
        recipe.data,
        manifest,
        place,
        batch_size=recipe.train.batch_size,
        micro_batch=recipe.train.micro_batch_size or recipe.train.batch_size,
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


def utilisation(recipe: Recipe, flops: int, step_s: float, device: torch.device) -> dict[str, float | None]:
    """MFU of a step of `step_s` seconds: of the matrix product's rate measured now, and of the data sheet's."""
    dtype = compute_dtype(recipe.deepspeed)
    rate = flops * recipe.train.batch_size / step_s
    return {
        "mfu_of_matmul": round(rate / matmul_rate(device, dtype), 4),
        "mfu_of_peak": round(rate / device_peak(device, dtype), 4) if device.type == "cuda" else None,
    }


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `asdict`."""
    recipe = Recipe()
    for section in SECTIONS:
        entries = {key: tuple(entry) if isinstance(entry, list) else entry for key, entry in values[section].items()}
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **entries)})
    return recipe


def limit_memory(limit: int) -> None:
    """Let this process allocate at most `limit` bytes on its device, 0 for no limit."""
    if limit and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    elif limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(point: dict[str, Any]) -> int:
    """Measure a point in this process and print its row."""
    limit_memory(point["memory_limit"])
    row = measure_point(recipe_from_dict(point["recipe"]), point["arm"], point["warmup"], point["steps"])
    print(json.dumps(row | {"peak_resident_mb": round(peak_resident_mb(), 1)}))
    return 0


if __name__ == "__main__":
    from dist_train.errors import run_command

    sys.exit(run_command(lambda: main(json.loads(sys.argv[1]))))
