"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dist_train.config import OptimConfig
from dist_train.errors import UseError


def count_steps(epochs: float, samples: int, batch_size: int) -> int:
    """Optimizer steps of a run: its last batch may take samples of the epoch after."""
    return math.ceil(epochs * samples / batch_size)


def scaled_rate(config: OptimConfig, batch_size: int) -> float:
    """The highest learning rate after the batch-size rule: none, linear (Goyal et al. 2017) or square root."""
    ratio = batch_size / config.lr_reference_batch
    return config.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.lr_scaling]


def check_schedule(config: OptimConfig, total_steps: int) -> None:
    """Raise UseError for a schedule that cannot be followed."""
    if config.warmup_steps >= total_steps:
        raise UseError(
            f"optim.warmup_steps {config.warmup_steps} leaves nothing of the run's {total_steps} steps; "
            "lower it or train longer"
        )


def learning_rate(config: OptimConfig, batch_size: int, step: int, total_steps: int, samples_per_epoch: int) -> float:
    """Rate of optimizer step `step` (from 0) of a run of `total_steps`.

    Linear warm-up from 0 over warmup_steps, then
    - constant: the highest rate;
    - constant_epoch: divided by decay_factor after every decay_epochs epochs (the paper: by 3 after every 20);
    - cosine: half a cosine that reaches 0 at the last step.
    """
    highest = scaled_rate(config, batch_size)
    if step < config.warmup_steps:
        return highest * step / config.warmup_steps
    if config.schedule == "constant":
        return highest
    if config.schedule == "constant_epoch":
        epoch = step * batch_size // samples_per_epoch
        return highest / config.decay_factor ** (epoch // config.decay_epochs)
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
