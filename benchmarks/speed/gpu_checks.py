"""What the GPU suite finds right or wrong: arithmetic, pixels, precision, CUDA graphs. `met` of a row is the verdict.

The device is the GPU if there is one, else the CPU.
"""

from __future__ import annotations

import copy
import math
from contextlib import closing
from dataclasses import replace
from itertools import cycle, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.gpu_loader import decoder
from benchmarks.speed.own_step import OwnStep, synthetic_batch
from dist_train.config import (
    DataConfig,
    DeepSpeedConfig,
    Head,
    ModelConfig,
    OptimConfig,
    Precision,
    Recipe,
    TrainConfig,
    ZeroStage,
)
from dist_train.data.augment import draw_augmentation, no_augmentation
from dist_train.data.colour_torch import fastest_colour_change
from dist_train.data.fetch import ShardFetcher
from dist_train.data.loader import Batch
from dist_train.data.manifest import read_manifest
from dist_train.data.pipeline import ImagePipeline
from dist_train.data.plan import EpochPlan
from dist_train.errors import WorkError
from dist_train.models.build import build_model
from dist_train.train.engine import init_process_group
from dist_train.train.meters import device_name
from dist_train.train.precision import measured_products
from dist_train.train.step import make_forward

SMALL_BACKBONE, SMALL_SIZE, SMALL_BATCH, SMALL_CLASSES = "vit_tiny_patch16", 64, 16, 100
SMALL_TOKENS, SMALL_VOCABULARY = 8, 2000  # `synthetic_batch` draws ids below 2,000
SMALL_MODELS: dict[str, tuple[Head, int]] = {"cls": ("cls", 0), "ifa": ("ifa", 0), "vilt": ("cls", SMALL_TOKENS)}
LOSS_LIMITS: dict[Precision, float] = {"float32": 1e-5, "bf16": 2e-2, "bf16_autocast": 2e-2}
"""Largest relative difference from float64 of the loss and of the gradient's norm."""
PIXEL_LIMIT = 1.5
"""Largest mean absolute difference of the two pipelines' pixels, of 255."""
GRAPH_LIMIT = 1e-3
"""Largest relative difference of a loss when forward and backward pass are a CUDA graph: some kernels add up in an
order that is not the same each time."""
LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


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
    met = True
    for name, (settings, train, size) in ways.items():
        augmentation = no_augmentation(len(positions))
        if train:
            augmentation = draw_augmentation(settings, 0, positions.epoch, positions.sample)
        made = []
        for device in (device_id, None):
            pipeline = ImagePipeline(
                settings, train=train, baked=size, batch_size=len(positions), threads=4, device_id=device, depth=1
            )
            with closing(pipeline):
                pipeline.feed(fetched.images, augmentation)
                made.append(pipeline.take().cpu().double())
        std = torch.tensor(settings.std, dtype=torch.float64).reshape(1, 3, 1, 1)
        difference = (made[0] - made[1]) * 255 * std
        luma = torch.einsum("bchw,c->bhw", difference, LUMA)
        mean = difference.abs().mean().item()
        met &= mean <= PIXEL_LIMIT  # a NaN is not
        row |= {
            f"{name}_mean": _short(mean),
            f"{name}_highest": _short(difference.abs().max().item()),
            f"{name}_luma_mean": _short(luma.abs().mean().item()),
        }
    if device_id is not None:  # colour_torch: Triton does not work here, and images cost more
        change = fastest_colour_change(torch.device("cuda", device_id), config.image_size)
        row["colours_by"] = change.__module__.rpartition(".")[2]
    return row | {"limit": PIXEL_LIMIT} | decoder(on_gpu=device_id is not None) | {"met": met}


def check_training(point: dict[str, Any]) -> dict[str, Any]:
    """A few steps of a small model through the engine; `met` says that every loss is finite and the last is lower than
    the first, as none is where every step was skipped for an overflow.

    point: precision, zero_stage, steps.
    """
    recipe = small_recipe("ifa", 0, point["precision"], point["zero_stage"])
    with closing(OwnStep(recipe, init_process_group(), SMALL_CLASSES)) as own:
        batches = repeat(synthetic_batch(recipe, SMALL_BATCH, SMALL_CLASSES, own.device))
        losses = [float(own(batches)) for _ in range(point["steps"])]
    return {
        "device": device_name(own.device),
        "precision": point["precision"],
        "zero_stage": point["zero_stage"],
        **{f"loss_{step}": _short(loss) for step, loss in enumerate(losses)},
        "met": all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0],
    }


def check_graphs(point: dict[str, Any]) -> dict[str, Any]:
    """Losses of the same steps, kernel by kernel and as a CUDA graph: with dropout, mixup and two micro-batches a step.

    Both begin with the same weights and random numbers. point: steps.
    """
    recipe = small_recipe("ifa", 0, "bf16", zero_stage=0)
    recipe = replace(
        recipe,
        data=replace(recipe.data, mixup=0.4),
        model=replace(recipe.model, dropout=0.1, compile="none"),
        optim=OptimConfig(lr=0.05),
        train=replace(recipe.train, batch_size=2 * SMALL_BATCH, micro_batch_size=SMALL_BATCH),
    )
    losses: dict[bool, list[float]] = {}
    for graphs in (False, True):
        with closing(OwnStep(recipe, init_process_group(), SMALL_CLASSES, graphs=graphs)) as own:
            seeds = (replace(recipe, train=replace(recipe.train, seed=seed)) for seed in range(4))
            batches = cycle([synthetic_batch(seeded, SMALL_BATCH, SMALL_CLASSES, own.device) for seeded in seeds])
            losses[graphs] = [float(own(batches)) for _ in range(point["steps"])]
    differences = [abs(mine / its - 1) for mine, its in zip(losses[True], losses[False], strict=True)]
    return {
        "device": device_name(own.device),
        "loss_first": _short(losses[False][0]),
        "loss_last": _short(losses[False][-1]),
        "loss_last_of_graph": _short(losses[True][-1]),
        "highest_difference": _short(max(differences)),
        "limit": GRAPH_LIMIT,
        "met": all(difference <= GRAPH_LIMIT for difference in differences),  # a NaN is not
    }


def check_products(point: dict[str, Any]) -> dict[str, Any]:
    """Share of the matrix products' FLOPs, of forward and backward pass, that are in bf16 where the recipe says so."""
    place = init_process_group()
    shares: dict[str, float] = {}
    for name, (head, tokens) in SMALL_MODELS.items():
        for precision in ("bf16", "bf16_autocast"):
            recipe = small_recipe(head, tokens, precision, zero_stage=0)
            vocabulary = SMALL_VOCABULARY if tokens else 0
            with closing(OwnStep(recipe, place, SMALL_CLASSES, vocabulary)) as own, measured_products() as products:
                batch = padded_batch(recipe, own.device)
                own.engine.backward(own.objective(own.forward(batch).float(), batch.labels, batch.weights))
            shares[f"{name}_{precision}"] = products.shares().get("bf16", 0.0)
    figures = {name: round(share, 6) for name, share in shares.items()}
    return {"device": device_name(own.device), **figures, "met": min(shares.values()) == 1.0}


def small_recipe(head: Head, text_tokens: int, precision: Precision, zero_stage: ZeroStage) -> Recipe:
    """The recipe of a small model whose gradient reaches every layer (the head does not start at zero)."""
    return Recipe(
        data=DataConfig(image_size=SMALL_SIZE),
        model=ModelConfig(
            backbone=SMALL_BACKBONE, head=head, head_init="mean", text_tokens=text_tokens, compile="none"
        ),
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
