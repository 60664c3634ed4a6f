"""What one training step costs: time, throughput, data wait, memory, FLOPs, MFU and energy of one recipe on one device.

Each point is measured in a process of its own, so that its memory is its own. Three arms: `synthetic` trains on one
batch that stays on the device (the model alone), `loader` only loads, `end_to_end` does both as a run does.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from benchmarks.result import environment_of_one_process, write_result
from dist_train.cli import SECTIONS
from dist_train.config import Recipe
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.models.build import build_model
from dist_train.train.engine import build_engine, compile_mode, init_process_group, torch_device
from dist_train.train.inputs import build_tokenizer, one_sample
from dist_train.train.losses import Objective
from dist_train.train.meters import (
    StepMeter,
    device_peak,
    matmul_rate,
    memory_figures,
    outside_torch_mb,
    peak_resident_mb,
    synchronize,
    training_flops_per_sample,
)
from dist_train.train.precision import compute_dtype, precision_of
from dist_train.train.step import TrainStep, make_forward

Arm = Literal["synthetic", "loader", "end_to_end"]
ARMS: tuple[Arm, ...] = ("synthetic", "loader", "end_to_end")
PAPER_CLASSES = 3263  # of DAF; of a synthetic point without a shard set
SYNTHETIC_VOCABULARY = 30522  # of bert-base-uncased


def measure_steps(recipe: Recipe, arms: list[Arm], warmup: int, steps: int, name: str) -> Path:
    """Measure the arms, a process each, and write the result; returns its path."""
    rows = [run_point(recipe, arm, warmup, steps) for arm in arms]
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


def free_memory() -> None:
    """Give back what nothing refers to any more, to the driver too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        manifest = read_manifest(recipe.data.shards)
        tokenizer = build_tokenizer(recipe, Path(recipe.train.run))
        classes, vocabulary = len(manifest.classes), tokenizer.vocab_size if tokenizer else 0
        outside = outside_torch_mb(device) if device.type == "cuda" else 0.0
        loader = TrainLoader(
            recipe.data,
            manifest,
            place,
            batch_size=recipe.train.batch_size,
            micro_batch=micro_batch,
            seed=recipe.train.seed,
            tokenizer=tokenizer,
        )
        batches = iter(loader)
        first = next(batches)  # the pipeline has then all memory that it needs for images like these
        if device.type == "cuda":
            loaded["dali_mb"] = round(outside_torch_mb(device) - outside, 1)
        batches = chain([first], batches)
    accumulation = recipe.train.batch_size // micro_batch
    if arm == "loader":
        times = timed(lambda _: [next(batches) for _ in range(accumulation)], warmup, steps, device)
        return step_figures(times, recipe.train.batch_size) | memory_figures(device) | loaded

    torch.manual_seed(recipe.train.seed)
    model, _ = build_model(recipe.model, recipe.data.image_size, classes, vocabulary)
    flops = training_flops_per_sample(model, *one_sample(recipe))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    engine = build_engine(model, recipe, place, micro_batch)
    let_go.callback(engine.destroy)  # which something of DeepSpeed's refers to
    forward = make_forward(engine, recipe, device)
    meter = StepMeter(device, flops, 1.0)
    objective = Objective(recipe.optim, [1] * classes, device)
    graphs = compile_mode(recipe, device, place.world_size) == "graphs"
    train_step = TrainStep(engine, forward, objective, recipe, accumulation, place.rank, meter, graphs=graphs)
    energy = EnergyMeter(device)

    def step(number: int) -> None:
        if number == warmup:
            meter.reset()  # the time and the memory of the steps alone
            energy.start()
        train_step(batches, recipe.optim.lr, number)

    times = timed(step, warmup, steps, device)
    joules = energy.read()
    figures = step_figures(times, recipe.train.batch_size)
    figures |= {"data_wait_share": round(meter.data_wait / sum(times), 4)} | memory_figures(device) | loaded
    figures["matrix_products"] = train_step.products
    # What follows takes memory of its own.
    saved_mb = saved_activations_mb(engine.module, forward, next(batches))
    figures |= {"saved_activations_mb": saved_mb, "parameters": parameters, "gflops_per_image": round(flops / 1e9, 3)}
    dtype = compute_dtype(recipe.deepspeed)
    rate = flops * recipe.train.batch_size / float(np.median(times))
    figures["mfu_of_matmul"] = round(rate / matmul_rate(device, dtype), 4)
    figures["mfu_of_peak"] = round(rate / device_peak(device, dtype), 4) if device.type == "cuda" else None
    figures["joules_per_image"] = None if joules is None else round(joules / (steps * recipe.train.batch_size), 4)
    return figures


def timed(step: Any, warmup: int, steps: int, device: torch.device) -> list[float]:
    """Seconds of each of `steps` calls of step(number), after `warmup` others.

    A GPU's own clock is read between the steps, so that the host runs ahead of it as it does in training.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(1 + steps)]
        for number in range(warmup + steps):
            if number == warmup:
                synchronize(device)
                marks[0].record()
            step(number)
            if number >= warmup:
                marks[1 + number - warmup].record()
        synchronize(device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]
    times = []
    for number in range(warmup + steps):
        begin = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - begin)
    return times[warmup:]


def step_figures(times: list[float], batch_size: int) -> dict[str, Any]:
    """Median and tail of the step times, and the throughput of the median step."""
    median, p95, p99 = np.percentile(times, [50, 95, 99])
    return {
        "steps": len(times),
        "step_ms": round(1000 * median, 2),
        "step_ms_p95": round(1000 * p95, 2),
        "step_ms_p99": round(1000 * p99, 2),
        "images_per_s": round(batch_size / median, 2),
    }


def synthetic_batch(recipe: Recipe, size: int, classes: int, device: torch.device) -> Batch:
    """A batch of noise."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    side, tokens = recipe.data.image_size, recipe.model.text_tokens
    ids = torch.randint(1000, 2000, (size, tokens), generator=generator) if tokens else None
    return Batch(
        torch.randn(size, 3, side, side, generator=generator).to(device),
        torch.randint(classes, (size,), generator=generator).to(device),
        torch.ones(size, device=device),
        None if ids is None else ids.to(device),
        None if ids is None else torch.ones_like(ids, dtype=torch.bool, device=device),
        np.arange(size),
    )


def saved_activations_mb(model: torch.nn.Module, forward: Any, batch: Batch) -> float:
    """MB (10**6 bytes) that autograd keeps from one forward pass for the backward pass, beside the weights, with
    PyTorch's own operators."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.compiler.set_stance("force_eager"), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = functional.cross_entropy(forward(batch).float(), batch.labels)
    del loss
    return round(sum(kept.values()) / 1e6, 1)


class EnergyMeter:
    """Joules that a GPU took since `start`, by its own counter; None on devices without one."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type == "cuda":
            try:
                import pynvml

                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
                self._nvml = pynvml
                self.start()
            except Exception:  # no library, or no such counter
                self._handle = None

    def start(self) -> None:
        """Begin to count."""
        if self._handle is not None:
            self._begin = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def read(self) -> float | None:
        """Joules since `start`."""
        if self._handle is None:
            return None
        return (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._begin) / 1000


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
