"""The process group, and the model inside an engine: DeepSpeed's, or at ZeRO 0 a replica."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from dist_train.config import DeepSpeedConfig, OptimConfig, Recipe
from dist_train.data.loader import Place
from dist_train.errors import UseError, WorkError
from dist_train.models.build import Classifier, compile_blocks, compile_parts
from dist_train.models.layers import head_layer, is_decayed, layer_of
from dist_train.train.precision import check_precision, precision_of, uses_autocast
from dist_train.train.replica import Replica

Engine = deepspeed.DeepSpeedEngine | Replica

log = logging.getLogger(__name__)

_SILENT_STEPS = 1 << 30
# A bucket of gradients or parameters holds a tenth of the model, within these bounds. DeepSpeed's 5e8 numbers are more
# than a ViT-L has: nothing would be sent while the backward pass still runs, and a buffer of that size is allocated at
# every step. (`python -m benchmarks exchange --set settings`)
_SMALLEST_BUCKET, _LARGEST_BUCKET = 2_000_000, 50_000_000
# Seconds for all ranks to come to the meeting point, where train.timeout_s is shorter.
_START_S = 300.0


def init_process_group(timeout_s: float = 1800) -> Place:
    """Join the process group that the launcher or SLURM describes; alone, form a group of one.

    timeout_s: longest wait in a collective, seconds; for the ranks to meet there are five minutes where it is shorter.
    Returns this process's place. Raises WorkError where the ranks do not find each other.
    """
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_tells_something)
    # Newer torch has other names for what DeepSpeed's ZeRO 3 calls, and says so at every call on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile a collective of tensor-parallel inference here, for a minute, on every rank of a new host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if timeout_s < 1:
        raise UseError(f"train.timeout_s must be at least 1 second, not {timeout_s:g}")
    _describe_ranks()
    gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if gpu:
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        _meet("nccl" if gpu else "gloo", timeout_s, torch.device("cuda", local_rank) if gpu else torch.device("cpu"))
    world_size = torch.distributed.get_world_size()
    return Place(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size),
        device_id=local_rank if gpu else None,
    )


def _tells_something(record: logging.LogRecord) -> bool:
    """Not that an optimizer of torch's is untested with ZeRO: the tests here have all of them."""
    return "untested optimizer" not in record.getMessage()


def _meet(backend: str, timeout_s: float, device: torch.device) -> None:
    patience = timedelta(seconds=max(timeout_s, _START_S))  # hosts take unequally long to import
    try:
        store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=patience))
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
        torch.distributed.barrier()
    except RuntimeError as error:
        raise WorkError(
            f"the ranks did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: a host is "
            "down, a port is closed or in use, or GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME do not name the interface "
            f"between the hosts ({str(error).splitlines()[0][:200]})"
        ) from None


def _describe_ranks() -> None:
    """Put what torch.distributed wants to know into the environment, unless a launcher has."""
    if "RANK" in os.environ:
        return
    if "SLURM_STEP_NUM_TASKS" in os.environ:  # srun sets it, sbatch alone does not
        if "MASTER_ADDR" not in os.environ:
            raise UseError(
                "under srun MASTER_ADDR must name the first host; start with launch/slurm.sbatch, which does"
            )
        tasks_per_node = os.environ["SLURM_STEP_TASKS_PER_NODE"]  # such as 8(x2),4
        slurm = {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": tasks_per_node.split("(")[0].split(",")[0],
        }
        # All ranks of a job come to the same port, other jobs on the host to others.
        port = 20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000
        os.environ.update({"MASTER_PORT": str(port)} | dict(os.environ) | slurm)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({key: str(value) for key, value in alone.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def torch_device(place: Place) -> torch.device:
    """Where this process computes."""
    return torch.device("cpu") if place.device_id is None else torch.device("cuda", place.device_id)


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
    extra: dict[str, Any] = {}
    path = Path(config.config or "")
    if config.config is not None:
        try:
            extra = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UseError(f"deepspeed.config {path}: cannot be read as JSON ({error})") from None
    ours = _buckets(config.zero_stage, world_size, parameters)
    if config.zero_stage in (1, 2) and recipe.optim.clip_norm == 0 and config.offload == "none":
        ours["compute_grad_norm"] = False  # a norm for each parameter, which only clipping reads
    extra["zero_optimization"] = ours | extra.get("zero_optimization", {})
    return _merge(extra, settings, path, "")


def _buckets(zero_stage: int, world_size: int, parameters: int) -> dict[str, Any]:
    """How ZeRO collects gradients; `python -m benchmarks engine` measures what it saves."""
    bucket = min(max(parameters // 10, _SMALLEST_BUCKET), _LARGEST_BUCKET)
    bucket -= bucket % 2  # DeepSpeed refuses odd ones
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


def _merge(extra: dict[str, Any], settings: dict[str, Any], path: Path, prefix: str) -> dict[str, Any]:
    merged = dict(extra)
    for key, value in settings.items():
        if isinstance(value, dict):
            merged[key] = _merge(extra.get(key, {}), value, path, f"{prefix}{key}.")
        elif extra.get(key, value) not in (value, "auto"):
            raise UseError(
                f"{path}: {prefix}{key} is {extra[key]!r}, but the recipe makes it {value!r}; "
                "remove it there or change the recipe"
            )
        else:
            merged[key] = value
    return merged


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the trainable parameters of a `Classifier`.

    Parameters of one rate and decay make a group; the rate is set at each step, times the group's `rate_scale`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = 0 if config.layer_decay == 1 else head_layer(model) - layer_of(model, name)
            decay = config.weight_decay if config.decay_all or is_decayed(name, parameter) else 0.0
            groups.setdefault((config.layer_decay**depth, decay), []).append(parameter)
    described = [
        {"params": parameters, "rate_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(described, config.lr, config.momentum, fused=True)
    return torch.optim.AdamW(described, config.lr, config.betas, fused=True)


def check_combination(recipe: Recipe, device: torch.device, world_size: int = 1) -> None:
    """Raise UseError for settings that do not go together, or not on this device."""
    config, stage = recipe.deepspeed, recipe.deepspeed.zero_stage
    check_precision(config, device)
    precision = precision_of(config)
    if not recipe.model.backbone.startswith("vit_") and precision in ("bf16", "fp16") and not uses_autocast(config):
        raise UseError(
            f"{recipe.model.backbone} has batch norms, whose float32 statistics DeepSpeed's {precision} cannot "
            "take; use deepspeed.precision bf16 with deepspeed.zero_stage 0, or float32"
        )
    if config.offload == "optimizer" and stage == 0:
        raise UseError("deepspeed.offload optimizer needs deepspeed.zero_stage 1, 2 or 3")
    if config.offload == "parameters" and stage != 3:
        raise UseError(f"deepspeed.offload parameters needs deepspeed.zero_stage 3, not {stage}")
    if recipe.train.ema and stage == 3:
        raise UseError(
            "train.ema needs whole parameters on every rank, which deepspeed.zero_stage 3 has not; use 0 to 2"
        )
    if recipe.model.compile in ("kernels", "graphs") and stage == 3:
        raise UseError("model.compile cannot see parameters that deepspeed.zero_stage 3 gathers; use 0 to 2, or none")
    if recipe.model.compile == "graphs" and (problem := _no_graphs(recipe, device, world_size)):
        raise UseError(f"model.compile graphs {problem}; use kernels, or auto")
    if recipe.train.channels_last and recipe.model.backbone.startswith("vit_"):
        raise UseError(f"train.channels_last is for CNNs; with {recipe.model.backbone} use false")
    for key, value in (("train.ema", recipe.train.ema), ("optim.class_weights_beta", recipe.optim.class_weights_beta)):
        if not 0 <= value < 1:
            raise UseError(f"{key} is {value}; it must be at least 0 and below 1")
    if not 0 < recipe.optim.layer_decay <= 1:
        raise UseError(f"optim.layer_decay is {recipe.optim.layer_decay}; it must be above 0 and at most 1")


def _no_graphs(recipe: Recipe, device: torch.device, world_size: int) -> str:
    """Why forward and backward pass cannot be one CUDA graph; empty where they can."""
    if device.type != "cuda":
        return "needs a GPU"
    if uses_deepspeed(recipe.deepspeed):
        return "does not go with DeepSpeed's engine (deepspeed.zero_stage above 0, precision fp16, deepspeed.config)"
    if world_size > 1:
        return f"is for one GPU, not {world_size}: the exchange of gradients is not recorded"
    if recipe.model.checkpoint_blocks:
        return "does not go with model.checkpoint_blocks, whose random numbers cannot be recorded"
    return ""


def compile_mode(recipe: Recipe, device: torch.device, world_size: int) -> str:
    """What model.compile is for this recipe and place: none, kernels or graphs."""
    if recipe.model.compile != "auto":
        return recipe.model.compile
    if device.type != "cuda" or recipe.deepspeed.zero_stage == 3:
        return "none"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        log.warning("model.compile auto: none, as torch.compile needs a C compiler and there is none here; install gcc")
        return "none"
    return "kernels" if _no_graphs(recipe, device, world_size) else "graphs"


def uses_deepspeed(config: DeepSpeedConfig) -> bool:
    """Whether DeepSpeed's engine makes the steps: to shard, to scale fp16's loss, or to heed settings of its own."""
    return config.zero_stage > 0 or precision_of(config) == "fp16" or config.config is not None


def build_engine(model: Classifier, recipe: Recipe, place: Place, micro_batch: int) -> Engine:
    """The model on its device, ready for steps. Raises UseError for settings that do not go together."""
    device = torch_device(place)
    check_combination(recipe, device, place.world_size)
    model.to(device)
    if compile_mode(recipe, device, place.world_size) != "none":
        # Compiled as a whole a model yields all gradients at the end of its backward pass; several ranks exchange them
        # meanwhile, block by block.
        (compile_parts if place.world_size == 1 and recipe.deepspeed.zero_stage == 0 else compile_blocks)(model)
    optimizer = build_optimizer(recipe.optim, model)
    if not uses_deepspeed(recipe.deepspeed):
        return Replica(
            model,
            optimizer,
            device,
            accumulation=recipe.train.batch_size // (place.world_size * micro_batch),
            clip_norm=recipe.optim.clip_norm,
            world_size=place.world_size,
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = deepspeed_settings(recipe, place.world_size, micro_batch, parameters)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if place.world_size == 1 and recipe.deepspeed.zero_stage == 0:
        # One process has nothing to reduce, but DeepSpeed would copy all gradients into one buffer and back.
        engine.enable_backward_allreduce = False
    return engine
