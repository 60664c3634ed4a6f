"""One optimizer step: forward and backward over the micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_train.config import Recipe
from dist_train.data.draws import Draw, random_bits
from dist_train.data.loader import Batch
from dist_train.models.build import Classifier
from dist_train.train.badsteps import BadSteps
from dist_train.train.engine import Engine
from dist_train.train.evaluate import Forward
from dist_train.train.graphs import GraphedPass, generator_of
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter, forget_peak_memory, peak_memory_mb
from dist_train.train.mixing import Mix, mix_neighbours
from dist_train.train.noise_scale import NoiseMeter
from dist_train.train.precision import check_products, compute_dtype, measured_products, set_arithmetic, uses_autocast
from dist_train.train.replica import Replica


@dataclass
class TrainStep:
    """Makes the optimizer steps of a run; the model is in train mode. accumulation: micro-batches of this rank in a
    step. graphs: whether forward and backward pass are a CUDA graph.
    """

    engine: Engine
    forward: Forward
    objective: Objective
    recipe: Recipe
    accumulation: int
    rank: int
    meter: StepMeter
    bad_steps: BadSteps | None = None
    noise: NoiseMeter | None = None
    graphs: bool = False
    parameters: int = 0
    """Numbers that the model has; here, as ZeRO 3 leaves none of them in place."""
    products: str | None = None
    """What computed the matrix products of the first pass, in words; None before it."""
    _graph: GraphedPass | None = field(default=None, init=False)

    def __call__(self, batches: Iterator[Batch], rate: float, step: int) -> Tensor:
        """Make optimizer step `step` (from 0) at a learning rate. Returns this rank's mean loss, on the device.

        A step that `bad_steps` skips changes nothing and has loss 0. The first step ever runs without compiled code or
        graph: its matrix products are looked at. Raises WorkError where they are not in the recipe's precision.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        noise = self.noise if self.noise is not None and self.noise.due(step) else None
        with noise.watching() if noise is not None else nullcontext():
            loss = self._passes(batches, step, noise)
        return torch.zeros((), device=self.engine.device) if loss is None else loss

    def _passes(self, batches: Iterator[Batch], step: int, noise: NoiseMeter | None) -> Tensor | None:
        """The micro-batches of a step and its update. Returns this rank's mean loss, or None where it is skipped."""
        engine, seed = self.engine, self.recipe.train.seed
        total: Tensor | None = None
        first_step = self.products is None
        for micro in range(self.accumulation):
            batch = self.meter.wait(lambda: next(batches))
            position = (self.rank * self.accumulation + micro) * len(batch.labels)
            batch, mix = mix_neighbours(self.recipe.data, batch, seed, step, position)
            generator_of(engine.device).manual_seed(int(random_bits(seed, Draw.DROPOUT, step, micro, self.rank) >> 1))
            if self.bad_steps is not None:
                self.bad_steps.before_forward(engine.module)
            if self.products is None:
                with measured_products() as products:
                    loss = self._pass(batch, mix, step)
                self.products = check_products(self.recipe.deepspeed, products)
            elif self.graphs and not first_step:
                loss = self._graphed_pass(batch, mix, step)
            else:
                loss = self._pass(batch, mix, step)
            if loss is None:
                return None
            if noise is not None:
                noise.micro_batch_done()
                if micro == self.accumulation - 1 and engine.zero_optimization_stage() == 0:
                    noise.before_update([p.grad for p in engine.module.parameters() if p.grad is not None])
            engine.step()
            share = loss / self.accumulation
            total = share if total is None else total + share
        if noise is not None:
            noise.step_done(engine.get_global_grad_norm())
        assert total is not None
        return total

    def _pass(self, batch: Batch, mix: Mix | None, step: int) -> Tensor | None:
        """Forward and backward pass of a micro-batch. Returns its loss, or None where the step is to be skipped."""
        with self.meter.in_forward():
            loss = self._loss(batch, mix)
        if self.bad_steps is not None and self.bad_steps.skips(self.engine.module, loss, step):
            return None
        self.engine.backward(loss)
        return loss.detach()

    def _graphed_pass(self, batch: Batch, mix: Mix | None, step: int) -> Tensor | None:
        engine = self.engine
        assert isinstance(engine, Replica)  # a recipe that asks for more is refused
        if self._graph is None:
            self._graph = GraphedPass(engine, self._loss)
            forget_peak_memory(engine.device)
            loss = self._graph(batch, mix)
            self.meter.recorded_mb = peak_memory_mb(engine.device)
        else:
            loss = self._graph(batch, mix)
        if self.bad_steps is not None and self.bad_steps.skips(engine.module, loss, step):
            engine.drop_gradients()
            return None
        return loss

    def _loss(self, batch: Batch, mix: Mix | None) -> Tensor:
        return self.objective(self.forward(batch).float(), batch.targets, batch.weights, mix)


def make_forward(model: Engine | Classifier, recipe: Recipe, device: torch.device) -> Forward:
    """A function from batch to logits in the recipe's precision, which this gives the model, or that of the engine."""
    config = recipe.deepspeed
    set_arithmetic(model if isinstance(model, Classifier) else model.module, config)
    dtype = torch.float32 if uses_autocast(config) else compute_dtype(config)
    # Activations take the images' layout; weights keep theirs, as DeepSpeed refuses or flattens any other.
    layout = torch.channels_last if recipe.train.channels_last else torch.preserve_format

    def forward(batch: Batch) -> Tensor:
        # Features of images come as the backbone gave them.
        images = batch.images.to(dtype, memory_format=layout) if batch.images.ndim == 4 else batch.images
        return model(images) if batch.text_ids is None else model(images, batch.text_ids, batch.text_mask)

    return forward
