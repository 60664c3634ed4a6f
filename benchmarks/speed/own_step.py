"""The training step of a recipe, built as a run builds it and ready to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from dist_train.config import Recipe
from dist_train.data.loader import Batch
from dist_train.models.build import build_model
from dist_train.place import Place
from dist_train.train.engine import torch_device
from dist_train.train.setup import build_step


class OwnStep:
    """Makes the optimizer steps of a recipe on one device.

    graphs: whether forward and backward pass are a CUDA graph; None: as the recipe says. True also records a model that
    is not compiled, which no recipe does.
    """

    def __init__(
        self, recipe: Recipe, place: Place, classes: int, vocabulary: int = 0, graphs: bool | None = None
    ) -> None:
        self.recipe, self.device = recipe, torch_device(place)
        torch.manual_seed(recipe.train.seed)
        with self.device:  # a ViT-L takes seconds to draw on the host
            model, _ = build_model(recipe.model, recipe.data.image_size, classes, vocabulary)
        self.train_step = build_step(model, recipe, place, [1] * classes, graphs=graphs)
        self.engine, self.forward = self.train_step.engine, self.train_step.forward
        self.objective, self.meter = self.train_step.objective, self.train_step.meter
        self.flops, self.parameters = self.meter.flops_per_sample, self.train_step.parameters
        self._steps = 0

    def __call__(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Make the next step. Returns its loss, on the device."""
        self._steps += 1
        return self.train_step(batches, self.recipe.optim.lr, self._steps - 1)

    def record(self) -> None:
        """From now on forward and backward pass are a CUDA graph: the same kernels, launched as one."""
        self.train_step.graphs = True

    def close(self) -> None:
        """Let go of the engine, which something of DeepSpeed's refers to."""
        self.engine.destroy()

    @property
    def products(self) -> str | None:
        """What computed the matrix products of the first step, in words."""
        return self.train_step.products


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
