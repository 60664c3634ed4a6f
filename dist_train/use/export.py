"""A finished run's weights for other programs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.errors import UseError, written
from dist_train.files import write_atomically
from dist_train.models.backbones import timm_name
from dist_train.models.build import to_timm_state_dict
from dist_train.models.heads import HEADS
from dist_train.models.names import vit_shape
from dist_train.models.saved import read_step
from dist_train.use.trained import TrainedModel


def describe(trained: TrainedModel) -> dict[str, Any]:
    """What one must know to use a model elsewhere: its classes, what images are to it and, with text, what makes ids of
    tags."""
    recipe = trained.recipe
    described: dict[str, Any] = {
        "classes": trained.class_names,
        "labels": recipe.data.labels,
        "image_size": recipe.data.image_size,
        "resize": f"{describe_crop(recipe.data)}; bilinear, antialiased",
        "mean": recipe.data.mean,
        "std": recipe.data.std,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "text_tokens": recipe.model.text_tokens,
        "weights": "averaged" if trained.averaged else "raw",
        "step": read_step(trained.checkpoint),
    }
    if trained.tokenizer is not None:
        described["tokenizer"] = trained.tokenizer.describe()
    return described


def describe_crop(data: DataConfig) -> str:
    """What an evaluation sees of an image, in words."""
    if data.eval_crop == "squash":
        return "the whole image, squashed to a square"
    shorter = math.floor(data.image_size / data.eval_crop_pct)
    return f"the middle square of the image, whose shorter side is made {shorter} pixels long"


def check_fits(weights: dict[str, Tensor], name: str, arguments: dict[str, int]) -> None:
    """Raise UseError where timm's model has more in its head than a linear layer on what it pools, and so does not take
    the weights: MetaFormer, LeViT, RepViT, CrossViT and others."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        theirs = timm.create_model(name, **arguments).state_dict()
    if {key: tensor.shape for key, tensor in weights.items()} != {key: tensor.shape for key, tensor in theirs.items()}:
        raise UseError(
            f"timm has no place for this model: the head of its {name} is more than a linear layer; export FILE.onnx"
        )


def metadata_texts(described: dict[str, Any]) -> dict[str, str]:
    """Metadata as both formats have it: text as it is, everything else as JSON."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}


def export(trained: TrainedModel, file: Path) -> str:
    """Write weights that load into timm's model, the rest beside them, and in the file's metadata what one needs to use
    them. Returns how they are loaded, in words. file: FILE.safetensors. Raises UseError where timm has no place for a
    classifier that should have one.
    """
    recipe = trained.recipe
    weights, extra = to_timm_state_dict(trained.model)
    name, arguments = timm_name(recipe.model.backbone, recipe.data.image_size)
    arguments |= {"num_classes": len(trained.class_names) if recipe.model.head == "cls" else 0}
    tensors = {key: tensor.cpu().contiguous() for key, tensor in {**weights, **extra}.items()}
    if not extra:
        check_fits(weights, name, arguments)
    described = describe(trained) | {
        "timm": {"model": name, **arguments},
        "norm_eps": recipe.model.norm_eps if vit_shape(recipe.model.backbone) else None,
    }
    with written(file, "choose another"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save(tensors, metadata_texts(described)))
    call = f"timm.create_model({', '.join([repr(name), *(f'{key}={value}' for key, value in arguments.items())])})"
    if not extra:
        return f"{file}: {len(weights)} tensors that load into {call}"
    is_without_norm = HEADS[recipe.model.head].reads != "pooled" and vit_shape(recipe.model.backbone) is not None
    missing = "; timm's own final norm stays untrained, as this head does without it" if is_without_norm else ""
    return (
        f"{file}: the {len(weights)} tensors of the backbone load into {call} with strict=False{missing}. "
        f"timm has no place for the other {len(extra)} ({', '.join(sorted(extra))}): for the classes take "
        "dist-train predict, or this file as model.weights"
    )
