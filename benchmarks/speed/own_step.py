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
from dist_train.train.engine import build_engine, compile_mode, torch_device
from dist_train.train.inputs import one_sample
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter, training_flops_per_sample
from dist_train.train.step import TrainStep, make_forward


class OwnStep:
    """Makes the optimizer steps of a recipe on one device.

    graphs: whether forward and backward pass are a CUDA graph; None: as the recipe says. True also records a model that
    is not compiled, which no recipe does.
    """

    def __init__(
        self, recipe: Recipe, place: Place, classes: int, vocabulary: int = 0, graphs: bool | None = None
    ) -> None:
        self.recipe, self.place = recipe, place
        self.device = torch_device(place)
        self.micro_batch = recipe.train.micro_batch_size or recipe.train.batch_size
        self.accumulation = recipe.train.batch_size // self.micro_batch
        torch.manual_seed(recipe.train.seed)
        with self.device:  # a ViT-L takes seconds to draw on the host
            model, _ = build_model(recipe.model, recipe.data.image_size, classes, vocabulary)
            self.flops = training_flops_per_sample(model, *one_sample(recipe))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = build_engine(model, recipe, place, self.micro_batch)
        self.forward = make_forward(self.engine, recipe, self.device)
        self.meter = StepMeter(self.device, self.flops, 1.0)
        self.objective = Objective(recipe.optim, [1] * classes, self.device)
        if graphs is None:
            graphs = compile_mode(recipe, self.device, place.world_size) == "graphs"
        self.train_step = self._train_step(graphs)
        self._steps = 0

    def _train_step(self, graphs: bool) -> TrainStep:
        return TrainStep(
            self.engine,
            self.forward,
            self.objective,
            self.recipe,
            self.accumulation,
            self.place.rank,
            self.meter,
            graphs=graphs,
        )

    def __call__(self, batches: Iterator[Batch]) -> torch.Tensor:
        """Make the next step. Returns its loss, on the device."""
        self._steps += 1
        return self.train_step(batches, self.recipe.optim.lr, self._steps - 1)

    def record(self) -> None:
        """From now on forward and backward pass are a CUDA graph: the same kernels, launched as one."""
        products = self.train_step.products
        self.train_step = self._train_step(graphs=True)
        self.train_step.products = products  # so that it does not look at them again

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
