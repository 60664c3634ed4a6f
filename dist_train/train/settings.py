"""What follows from a recipe's settings without a model: precision, who makes the steps, DeepSpeed's configuration.

Imports torch only where it must be asked what the GPU can do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_train.config import DeepSpeedConfig, Precision, Recipe
from dist_train.errors import UseError

_SILENT_STEPS = 1 << 30
# A bucket of gradients or parameters holds a tenth of the model, within these bounds. DeepSpeed's 5e8 numbers are more
# than a ViT-L has: nothing would be sent while the backward pass still runs, and a buffer of that size is allocated at
# every step. (`python -m benchmarks exchange --set settings`)
_SMALLEST_BUCKET, _LARGEST_BUCKET = 2_000_000, 50_000_000


def precision_of(config: DeepSpeedConfig) -> Precision:
    """The recipe's precision on this machine: `auto` is bf16 on a GPU that has it, by autocast's rules at ZeRO 0, else
    float32."""
    if config.precision != "auto":
        return config.precision
    import torch  # takes seconds, and only `auto` needs it

    if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)):
        return "float32"
    return "bf16_autocast" if config.zero_stage == 0 else "bf16"


def uses_autocast(config: DeepSpeedConfig) -> bool:
    """At ZeRO 0 bf16 is torch's autocast on float32 weights; from ZeRO 1 on DeepSpeed's, on bf16 weights with float32
    masters. (DeepSpeed's bf16 without ZeRO takes an unfused optimizer, ten times as slow on a CPU.)"""
    return precision_of(config) in ("bf16", "bf16_autocast") and config.zero_stage == 0


def uses_deepspeed(config: DeepSpeedConfig) -> bool:
    """Whether DeepSpeed's engine makes the steps: to shard, to scale fp16's loss, or to heed settings of its own."""
    return config.zero_stage > 0 or config.precision == "fp16" or config.config is not None


def why_no_graphs(recipe: Recipe, device: str, world_size: int) -> str:
    """Why forward and backward pass cannot be one CUDA graph; empty where they can. device: cpu or cuda."""
    if device != "cuda":
        return "needs a GPU"
    if uses_deepspeed(recipe.deepspeed):
        return "does not go with DeepSpeed's engine (deepspeed.zero_stage above 0, precision fp16, deepspeed.config)"
    if world_size > 1:
        return f"is for one GPU, not {world_size}: the exchange of gradients is not recorded"
    if recipe.train.noise_every:
        return "does not go with train.noise_every, which looks into the passes"
    if recipe.model.checkpoint_blocks:
        return "does not go with model.checkpoint_blocks, whose random numbers cannot be recorded"
    return ""


def read_deepspeed_config(config: DeepSpeedConfig) -> dict[str, Any]:
    """What is in the file of deepspeed.config; {} without one. Raises UseError where it is no JSON object."""
    if config.config is None:
        return {}
    path = Path(config.config)
    try:
        extra = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UseError(f"deepspeed.config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(extra, dict):
        raise UseError(f"deepspeed.config {path}: not a JSON object, which DeepSpeed's settings are")
    return extra


def deepspeed_settings(recipe: Recipe, world_size: int, micro_batch: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe, with every default that changes results written out. parameters: numbers
    that the model has.

    What changes no result (bucket sizes) is ours unless deepspeed.config has its own. Raises UseError where that file
    contradicts the recipe.
    """
    config, precision = recipe.deepspeed, precision_of(recipe.deepspeed)
    settings: dict[str, Any] = {
        "train_batch_size": recipe.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": recipe.train.batch_size // (world_size * micro_batch),
        # DeepSpeed clips to 1.0 when this key is missing, silently.
        "gradient_clipping": recipe.optim.clip_norm,
        "zero_optimization": {"stage": config.zero_stage, **_offload(config)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Overflows are fp16's; looking for them in every gradient makes the host wait for the GPU at each step. A loss
        # that is not finite ends a run at any stage (`badsteps.py`).
        "bf16": {"enabled": precision == "bf16" and not uses_autocast(config), "check_grad_overflow": False},
        # The loss scale starts at 2**16 and follows overflows.
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": _SILENT_STEPS,
    }
    extra, path = read_deepspeed_config(config), Path(config.config or "")
    _check_what_is_ours(extra, config, path)
    ours = _buckets(config.zero_stage, world_size, parameters)
    read = recipe.optim.clip_norm > 0 or recipe.train.noise_every > 0
    if config.zero_stage in (1, 2) and not read and config.offload == "none":
        ours["compute_grad_norm"] = False  # a norm for each parameter, which nothing reads
    extra["zero_optimization"] = ours | _section(extra, "zero_optimization", path)
    return _merge(extra, settings, path, "")


def bucket_numbers(parameters: int) -> int:
    """Numbers that a bucket of ZeRO's holds, of a model of so many."""
    bucket = min(max(parameters // 10, _SMALLEST_BUCKET), _LARGEST_BUCKET)
    return bucket - bucket % 2  # DeepSpeed refuses odd ones


def _buckets(zero_stage: int, world_size: int, parameters: int) -> dict[str, Any]:
    """How ZeRO collects gradients; `python -m benchmarks engine` measures what it saves."""
    bucket = bucket_numbers(parameters)
    return {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # One buffer for the gradients of a bucket spares the allocator of many ranks; one process has nothing to send
        # and would only copy. Not for ZeRO 3, which needs it, nor with offload, which sets it by itself.
        "contiguous_gradients": world_size > 1 or zero_stage == 3,
    }


def _offload(config: DeepSpeedConfig) -> dict[str, Any]:
    in_main_memory = {"device": "cpu"}
    return {
        "none": {},
        "optimizer": {"offload_optimizer": in_main_memory},
        "parameters": {"offload_optimizer": in_main_memory, "offload_param": in_main_memory},
    }[config.offload]


def _check_what_is_ours(extra: dict[str, Any], config: DeepSpeedConfig, path: Path) -> None:
    """Refuse what is decided by the recipe but stands in no settings of ours for `_merge` to compare."""
    for key in ("optimizer", "scheduler"):  # DeepSpeed ignores them beside the optimizer and the rates that it is given
        if key in extra:
            raise UseError(f"{path}: {key} is what the recipe's section optim says; remove it there")
    zero = _section(extra, "zero_optimization", path)
    for key in ("offload_optimizer", "offload_param"):
        device = _section(zero, key, path).get("device", "none")
        if key not in _offload(config) and device not in ("none", "auto"):
            raise UseError(
                f"{path}: zero_optimization.{key}.device is {device!r}, but deepspeed.offload is {config.offload}; "
                "remove it there or change the recipe"
            )


def _section(settings: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    if not isinstance(settings.get(key, {}), dict):
        raise UseError(f"{path}: {key} is {settings[key]!r}, but must be an object of settings")
    return settings.get(key, {})


def _merge(extra: dict[str, Any], settings: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    merged = dict(extra)
    for key, value in settings.items():
        if isinstance(value, dict):
            merged[key] = _merge(_section(extra, key, path), value, path, f"{prefix}{key}.")
        elif extra.get(key, value) not in (value, "auto"):
            raise UseError(
                f"{path}: {prefix}{key} is {extra[key]!r}, but the recipe makes it {value!r}; "
                "remove it there or change the recipe"
            )
        else:
            merged[key] = value
    return merged
