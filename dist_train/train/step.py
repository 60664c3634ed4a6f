"""One optimizer step: forward and backward over the micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor, nn

from dist_train.config import Recipe
from dist_train.data.draws import random_bits
from dist_train.data.loader import Batch
from dist_train.train.badsteps import BadSteps
from dist_train.train.engine import compute_dtype, precision_context, uses_autocast
from dist_train.train.evaluate import Forward
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.mixing import mix_neighbours

_DROPOUT = 4  # first counter of a draw: what it is for (data has 1 to 3 and 6, initial weights 5, mixing 7)


@dataclass
class TrainStep:
    """Makes the optimizer steps of a run. accumulation: micro-batches of this rank in a step."""

    engine: deepspeed.DeepSpeedEngine
    forward: Forward
    objective: Objective
    recipe: Recipe
    accumulation: int
    rank: int
    meter: StepMeter
    bad_steps: BadSteps | None = None

    def __call__(self, batches: Iterator[Batch], rate: float, step: int) -> Tensor:
        """Make optimizer step `step` (from 0) at a learning rate. Returns this rank's mean loss, on the device.

        A step that `bad_steps` skips changes nothing and has loss 0.
        """
        engine, seed = self.engine, self.recipe.train.seed
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]
        total = torch.zeros((), device=engine.device)
        engine.train()
        for micro in range(self.accumulation):
            batch = self.meter.wait(lambda: next(batches))
            position = (self.rank * self.accumulation + micro) * len(batch.labels)
            batch, mix = mix_neighbours(self.recipe.data, batch, seed, step, position)
            torch.manual_seed(int(random_bits(seed, _DROPOUT, step, micro, self.rank) >> 1))
            if self.bad_steps is not None:
                self.bad_steps.before_forward(engine.module)
            with self.meter.in_forward():
                logits = self.forward(batch).float()
            loss = self.objective(logits, batch.labels, batch.weights, mix)
            if self.bad_steps is not None and self.bad_steps.skips(engine.module, loss, step):
                return total
            engine.backward(loss)
            engine.step()
            total += loss.detach() / self.accumulation
        return total


def make_forward(model: nn.Module, recipe: Recipe, device: torch.device) -> Forward:
    """A function from batch to logits in the recipe's precision."""
    config = recipe.deepspeed
    dtype = torch.float32 if uses_autocast(config) else compute_dtype(config)
    # Activations take the images' layout; weights keep theirs, as DeepSpeed refuses or flattens any other.
    layout = torch.channels_last if recipe.train.channels_last else torch.preserve_format

    def forward(batch: Batch) -> Tensor:
        images = batch.images.to(dtype, memory_format=layout)
        with precision_context(config, device):
            return model(images) if batch.text_ids is None else model(images, batch.text_ids, batch.text_mask)

    return forward
