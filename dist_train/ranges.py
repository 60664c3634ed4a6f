"""Which values the numbers of a recipe may have: one table, one sentence for what lies outside."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from dist_train.config import Recipe
from dist_train.errors import UseError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; above, below: not these themselves."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least < value if self.above else self.least <= value)
            and (value < self.most if self.below else value <= self.most)
        )

    def __str__(self) -> str:
        ends = [f"{'above' if self.above else 'at least'} {self.least:,}"] if self.least > -math.inf else []
        ends += [f"{'below' if self.below else 'at most'} {self.most:,}"] if self.most < math.inf else []
        return " and ".join(ends) or "a finite number"


_ANY = Range()
_POSITIVE = Range(0, above=True)
_NOT_NEGATIVE = Range(0)
_AT_LEAST_1 = Range(1)
_SHARE = Range(0, 1, below=True)  # of a whole, or a rate of decay: 1 would leave nothing of what is new
_STRENGTH = Range(0, 1)

RANGES = {
    "data.cache_gb": _POSITIVE,
    "data.image_size": Range(1, 2**15),
    "data.crop_margin": Range(0, 2**15),
    "data.brightness": _STRENGTH,
    "data.contrast": _STRENGTH,
    "data.saturation": _STRENGTH,
    "data.hue": Range(0, 0.5),
    "data.mixup": _NOT_NEGATIVE,
    "data.cutmix": _NOT_NEGATIVE,
    "data.mean": _ANY,
    "data.std": _POSITIVE,
    "data.tag_vocabulary": _AT_LEAST_1,
    "data.streams": _NOT_NEGATIVE,
    "data.shuffle_window": _AT_LEAST_1,
    "data.threads": _NOT_NEGATIVE,
    "data.prefetch": _AT_LEAST_1,
    "data.max_bad_samples": _NOT_NEGATIVE,
    "data.max_pixels": _AT_LEAST_1,
    "model.text_tokens": _NOT_NEGATIVE,
    "model.dropout": _SHARE,
    "model.drop_path": _SHARE,
    "model.norm_eps": _POSITIVE,
    "optim.lr": _NOT_NEGATIVE,
    "optim.momentum": _SHARE,
    "optim.betas": _SHARE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.layer_decay": Range(0, 1, above=True),
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.decay_epochs": _AT_LEAST_1,
    "optim.decay_factor": _POSITIVE,
    "optim.lr_reference_batch": _AT_LEAST_1,
    "optim.label_smoothing": _SHARE,
    "optim.class_weights_beta": _SHARE,
    "optim.clip_norm": _NOT_NEGATIVE,
    "train.seed": Range(0, 2**63 - 1),
    "train.epochs": _AT_LEAST_1,
    "train.batch_size": Range(1, 2**24),
    "train.micro_batch_size": _NOT_NEGATIVE,
    "train.ema": _SHARE,
    "train.eval_batch_size": _AT_LEAST_1,
    "train.eval_every": _AT_LEAST_1,
    "train.log_every": _AT_LEAST_1,
    "train.stop_after_steps": _NOT_NEGATIVE,
    "train.keep_checkpoints": _AT_LEAST_1,
    "train.timeout_s": Range(1, 10**8),  # three years: more is beyond what collectives can count
    "train.skip_bad_steps": _NOT_NEGATIVE,
    "train.profile_steps": _NOT_NEGATIVE,
    "deepspeed.zero_stage": Range(0, 3),
}


def check_ranges(recipe: Recipe) -> None:
    """Raise UseError for the first number of a recipe that cannot be."""
    for section in fields(recipe):
        check_section(section.name, getattr(recipe, section.name))


def check_section(section: str, config: Any) -> None:
    """The same for one section: `data` with its DataConfig, and so on."""
    for field in fields(config):
        key, value = f"{section}.{field.name}", getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if key in RANGES and number not in RANGES[key]:
                each = "each of them" if isinstance(value, tuple) else "it"
                written = list(value) if isinstance(value, tuple) else value
                allowed = RANGES[key] if math.isfinite(number) else "a finite number"
                raise UseError(f"{key} is {written}; {each} must be {allowed}")
