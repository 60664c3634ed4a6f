"""One point of the GPU suite (`benchmarks/gpu.py`) in a process of its own: `python -m benchmarks.gpu_points POINT`.

POINT is a JSON object with a "kind", one of `KINDS`, and what that kind needs. The row, without its name, is printed as
one JSON object on the last line of the standard output. The device is the GPU if there is one, else the CPU.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from nvidia.dali import backend
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import ifa
from benchmarks.own_step import synthetic_batch
from benchmarks.step import describe, measure_point, recipe_from_dict
from dist_train.config import DataConfig, DeepSpeedConfig, ModelConfig, Recipe, TrainConfig
from dist_train.data.augment import draw_augmentation, no_augmentation
from dist_train.data.fetch import ShardFetcher
from dist_train.data.loader import Batch
from dist_train.data.manifest import read_manifest
from dist_train.data.pipeline import ImagePipeline
from dist_train.data.plan import EpochPlan
from dist_train.errors import UseError, WorkError, run_command
from dist_train.models.build import build_model
from dist_train.train.engine import build_engine, init_process_group, torch_device
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter, device_name, peak_resident_mb, synchronize
from dist_train.train.step import TrainStep, make_forward

SMALL_BACKBONE, SMALL_SIZE, SMALL_BATCH, SMALL_CLASSES = "vit_tiny_patch16", 64, 16, 100
SMALL_TOKENS, SMALL_VOCABULARY = 8, 2000  # `synthetic_batch` draws ids below 2,000
SMALL_MODELS = {"cls": ("cls", 0), "ifa": ("ifa", 0), "vilt": ("cls", SMALL_TOKENS)}
LOSS_LIMITS = {"float32": 1e-4, "bf16": 2e-2}
"""Largest relative difference from float64 of the loss and of the gradient's norm."""
PIXEL_LIMIT = 1.5
"""Largest mean absolute difference of the two pipelines' pixels, of 255."""
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def main(point: dict[str, Any]) -> int:
    """Measure a point in this process and print its row. Raises UseError or WorkError, one line, where that fails."""
    try:
        row = KINDS[point["kind"]](point)
    except (UseError, WorkError):
        raise
    except Exception as error:
        traceback.print_exc()
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise WorkError(f"{type(error).__name__}: {said}") from None
    print(json.dumps(row), flush=True)
    return 0


def check_loss(point: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradient of small models on the device against float64 on the CPU: fixed weights, a fixed batch.

    MODEL_PRECISION_loss and MODEL_PRECISION_gradient_norm are relative differences; MODEL_float32_gradient is the norm
    of the difference of the gradients over the norm of the exact one. `met` says that all are within the limits.
    """
    # float32 must be float32: what the tensor cores take by default in its place keeps 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: dict[str, float] = {}
    met = True
    for name, (head, tokens) in SMALL_MODELS.items():
        recipe = small_recipe(head, tokens, "float32", zero_stage=0)
        torch.manual_seed(0)
        model, _ = build_model(recipe.model, SMALL_SIZE, SMALL_CLASSES, SMALL_VOCABULARY if tokens else 0)
        batch = padded_batch(recipe, torch.device("cpu"))
        exact_model = copy.deepcopy(model).double()
        text = () if batch.text_ids is None else (batch.text_ids, batch.text_mask)
        exact_loss, exact = loss_and_gradient(exact_model, exact_model(batch.images.double(), *text), batch.labels)
        for precision, limit in LOSS_LIMITS.items():
            recipe = small_recipe(head, tokens, precision, zero_stage=0)
            on_device, batch = copy.deepcopy(model).to(device), padded_batch(recipe, device)
            forward = make_forward(on_device, recipe, device)
            loss, gradient = loss_and_gradient(on_device, forward(batch).float(), batch.labels)
            differences = {
                "loss": abs(loss - exact_loss) / exact_loss,
                "gradient_norm": abs(float(gradient.norm() / exact.norm()) - 1),
            }
            if precision == "float32":
                differences["gradient"] = float((gradient - exact).norm() / exact.norm())
            figures |= {f"{name}_{precision}_{what}": value for what, value in differences.items()}
            met &= all(value <= limit for value in differences.values())  # a NaN is not
    return {
        "device": device_name(device),
        "backbone": SMALL_BACKBONE,
        "image_size": SMALL_SIZE,
        "batch_size": SMALL_BATCH,
        **{what: _short(value) for what, value in figures.items()},
        **{f"limit_{precision}": limit for precision, limit in LOSS_LIMITS.items()},
        "met": met,
    }


def check_pixels(point: dict[str, Any]) -> dict[str, Any]:
    """What the device's pipeline makes of encoded images against what the CPU's does, with the same augmentation.

    train: baked images cut to size; train_resized: regions resized, as for images of any size; eval. WAY_mean and
    WAY_highest are absolute differences of pixels in units of 1/255, before the normalisation, WAY_luma_mean those of
    brightness alone: if these are small where the others are not, the decoders differ in how they enlarge the halved
    colour planes of a JPEG. point: shards, batch, image_size, crop_margin (pixels). Raises UseError where there is no
    shard set.
    """
    manifest = read_manifest(point["shards"])
    split = manifest.split("train")
    positions = EpochPlan(split.shard_samples, point["batch"], seed=0).batch(0)
    fetched = ShardFetcher(point["shards"], split, len(manifest.classes)).fetch(positions, with_text=False)
    if fetched.problems:
        raise WorkError(f"{point['shards']}: {next(iter(fetched.problems.values()))}; draw the set again")
    config = DataConfig(image_size=point["image_size"], crop_margin=point["crop_margin"])
    smaller = replace(config, image_size=3 * config.image_size // 4)  # so that resizing does something
    baked = manifest.baked_size()
    ways = {"train": (config, True, baked), "train_resized": (smaller, True, None), "eval": (config, False, baked)}
    device_id = 0 if torch.cuda.is_available() else None
    row: dict[str, Any] = {
        "device": device_name(torch.device("cpu" if device_id is None else "cuda")),
        "images": len(fetched.images),
    }
    for name, (settings, train, size) in ways.items():
        augmentation = no_augmentation(len(positions))
        if train:
            augmentation = draw_augmentation(settings, 0, positions.epoch, positions.sample)
        made = []
        for which in (device_id, None):
            pipeline = ImagePipeline(
                settings,
                train=train,
                baked=size,
                batch_size=len(positions),
                threads=4,
                device_id=which,
                depth=1,
            )
            pipeline.feed(fetched.images, augmentation)
            made.append(pipeline.take().cpu().double())
        std = torch.tensor(settings.std, dtype=torch.float64).reshape(1, 3, 1, 1)
        difference = (made[0] - made[1]) * 255 * std
        luma = torch.einsum("bchw,c->bhw", difference, LUMA)
        row |= {
            f"{name}_mean": _short(difference.abs().mean().item()),
            f"{name}_highest": _short(difference.abs().max().item()),
            f"{name}_luma_mean": _short(luma.abs().mean().item()),
        }
    row |= decoder(on_gpu=device_id is not None) | {"limit": PIXEL_LIMIT}
    return row | {"met": all(row[f"{name}_mean"] is not None and row[f"{name}_mean"] <= PIXEL_LIMIT for name in ways)}


def check_training(point: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a small model through the engine; `met` says that every loss is finite.

    point: precision, zero_stage, steps.
    """
    recipe = small_recipe("ifa", 0, point["precision"], point["zero_stage"])
    place = init_process_group()
    device = torch_device(place)
    torch.manual_seed(0)
    model, _ = build_model(recipe.model, SMALL_SIZE, SMALL_CLASSES)
    engine = build_engine(model, recipe, place, SMALL_BATCH)
    forward = make_forward(engine, recipe, device)
    objective = Objective(recipe.optim, [1] * SMALL_CLASSES, device)
    train_step = TrainStep(engine, forward, objective, recipe, 1, place.rank, StepMeter(device, 0.0, 1.0))
    batches = repeat(synthetic_batch(recipe, SMALL_BATCH, SMALL_CLASSES, device))
    losses = [float(train_step(batches, recipe.optim.lr, step)) for step in range(point["steps"])]
    return {
        "device": device_name(device),
        "precision": point["precision"],
        "zero_stage": point["zero_stage"],
        **{f"loss_{step}": _short(loss) for step, loss in enumerate(losses)},
        "met": all(math.isfinite(loss) for loss in losses),
    }


def measure_pairs(point: dict[str, Any]) -> dict[str, Any]:
    """The IFA head over the CLS head: steps of both in turns in one process, and what each takes of memory at most.

    time_over_cls is the median over the pairs of turns, with the lowest and highest; peak_over_cls_mb compares what a
    step allocates beyond what is there before it. point: as for `benchmarks.ifa`, with precision and pairs.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = ("cls", "ifa")
    steps = {which: ifa.training_step(ifa.make_model(point, which, device), point, device) for which in heads}
    for which in heads:
        steps[which]()  # allocates gradients and momentum
    peaks = {which: ifa.peak_bytes(steps[which], device) for which in heads}
    turns: dict[str, list[float]] = {which: [] for which in heads}
    for number in range(point["pairs"]):
        for which in heads if number % 2 else heads[::-1]:
            begin = time.perf_counter()
            steps[which]()
            synchronize(device)
            turns[which].append(time.perf_counter() - begin)
    ratios = [mine / cls for mine, cls in zip(turns["ifa"], turns["cls"], strict=True)]
    return {
        "backbone": point["backbone"],
        "image_size": point["size"],
        "batch_size": point["batch"],
        "precision": point["precision"],
        "pairs": point["pairs"],
        "cls_ms": round(1000 * statistics.median(turns["cls"]), 2),
        "ifa_ms": round(1000 * statistics.median(turns["ifa"]), 2),
        "time_over_cls": round(statistics.median(ratios), 4),
        "time_over_cls_lowest": round(min(ratios), 4),
        "time_over_cls_highest": round(max(ratios), 4),
        "cls_peak_mb": round(peaks["cls"] / 1e6, 2),
        "peak_over_cls_mb": round((peaks["ifa"] - peaks["cls"]) / 1e6, 3),
    }


def measure_arm(point: dict[str, Any]) -> dict[str, Any]:
    """One arm of `benchmarks.step`; where data is loaded, also what decodes. point: recipe, warmup, steps."""
    recipe = recipe_from_dict(point["recipe"])
    with JpegEngine(watch=point["kind"] != "synthetic") as jpeg:
        row = measure_point(recipe, point["kind"], point["warmup"], point["steps"])
    described = describe(recipe, point["kind"]) | {"compile": recipe.model.compile}
    if point["kind"] != "synthetic":
        on_gpu = torch.cuda.is_available() and recipe.data.device != "cpu"
        described |= {"data_device": "gpu" if on_gpu else "cpu"} | decoder(on_gpu)
        row |= {"jpeg_engine_busy_highest": jpeg.highest if on_gpu else None}
    return described | row | {"peak_resident_mb": round(peak_resident_mb(), 1)}


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "loss": check_loss,
    "pixels": check_pixels,
    "training": check_training,
    "pairs": measure_pairs,
    "synthetic": measure_arm,
    "loader": measure_arm,
    "end_to_end": measure_arm,
}


def decoder(on_gpu: bool) -> dict[str, Any]:
    """Which of DALI's decoders the pipeline uses, and what share of the images it may give to the hardware decoder.

    hw_decoder_load is the operator's default, which the pipeline does not change: an upper bound where the GPU has such
    a decoder, not a measurement. None on the CPU.
    """
    if not on_gpu:
        return {"decoder": "cpu", "hw_decoder_load": None}
    schema = backend.TryGetSchema("decoders__ImageSlice")
    return {
        "decoder": "mixed",
        "hw_decoder_load": ast.literal_eval(schema.GetArgumentDefaultValueString("hw_decoder_load")),
    }


class JpegEngine:
    """While this lasts, watches the GPU's JPEG decoder through NVML.

    highest: the largest utilisation that was read, in percent of the driver's sampling period; None where there is no
    GPU, no NVML, or none that knows such a figure.
    """

    def __init__(self, watch: bool) -> None:
        self.highest: int | None = None
        self._end = threading.Event()
        watch = watch and torch.cuda.is_available()
        self._thread = threading.Thread(target=self._watch, daemon=True) if watch else None

    def __enter__(self) -> JpegEngine:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
            while not self._end.wait(0.05):
                self.highest = max(self.highest or 0, int(pynvml.nvmlDeviceGetJpgUtilization(handle)[0]))
        except Exception:  # no library, or no such figure
            return


def small_recipe(head: str, text_tokens: int, precision: str, zero_stage: int) -> Recipe:
    """The recipe of a small model whose gradient reaches every layer (the head does not start at zero)."""
    return Recipe(
        data=DataConfig(image_size=SMALL_SIZE),
        model=ModelConfig(backbone=SMALL_BACKBONE, head=head, head_init="mean", text_tokens=text_tokens),
        train=TrainConfig(batch_size=SMALL_BATCH),
        deepspeed=DeepSpeedConfig(precision=precision, zero_stage=zero_stage),
    )


def padded_batch(recipe: Recipe, device: torch.device) -> Batch:
    """A synthetic batch in which the texts of every other sample are padded at the end."""
    batch = synthetic_batch(recipe, SMALL_BATCH, SMALL_CLASSES, device)
    if batch.text_mask is not None:
        batch.text_mask[::2, SMALL_TOKENS // 2 :] = False
    return batch


def loss_and_gradient(model: nn.Module, logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The mean cross-entropy of logits (B, classes), and its gradient by all parameters as one float64 CPU vector."""
    loss = functional.cross_entropy(logits, labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat([gradient.cpu().double().flatten() for gradient in gradients])


def _short(value: float) -> float | None:
    """Three digits of a figure; None for one that JSON cannot hold."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(json.loads(sys.argv[1]))))
