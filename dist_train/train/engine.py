"""The process group, and the model inside an engine: DeepSpeed's, or at ZeRO 0 a replica."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import warnings
from datetime import timedelta
from itertools import takewhile
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from dist_train.config import Compile, OptimConfig, Recipe
from dist_train.errors import UseError, WorkError
from dist_train.models.backbones import blocks_of
from dist_train.models.build import Classifier, compile_blocks, compile_parts
from dist_train.models.parameter_groups import is_decayed, layers_of, never_decayed
from dist_train.models.timm_models import TokenReader
from dist_train.place import Place
from dist_train.recipe import check_step
from dist_train.train.replica import Replica
from dist_train.train.settings import deepspeed_settings, uses_deepspeed, why_no_graphs

log = logging.getLogger(__name__)

# Seconds for all ranks to come to the meeting point, where train.timeout_s is shorter.
_START_S = 300.0


def init_process_group(timeout_s: float = 1800) -> Place:
    """Join the process group that the launcher or SLURM describes; alone, form a group of one.

    timeout_s: longest wait in a collective, seconds; for the ranks to meet there are five minutes where it is shorter.
    Returns this process's place. Raises WorkError where the ranks do not find each other.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Newer torch has other names for what DeepSpeed's ZeRO 3 calls, and says so at every call on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed would compile a collective of tensor-parallel inference here, for a minute, on every rank of a new host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _describe_ranks()
    gpu = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if gpu and local_rank >= (count := torch.cuda.device_count()):
        raise UseError(
            f"rank {os.environ['RANK']} is number {local_rank + 1} of its host, but sees {count} "
            f"GPU{'s' * (count != 1)}; start a rank for each GPU, and let each see all of its host's: no "
            "CUDA_VISIBLE_DEVICES of its own, under SLURM --gpus-per-node in place of --gpus-per-task"
        )
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


def leave_process_group() -> None:
    """Leave the process group, so that this process can join another one."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # which forgets what DeepSpeed has kept of it, too
    else:
        torch.distributed.destroy_process_group()


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
    """Put what torch.distributed wants to know into the environment, unless a launcher has. Raises UseError where that
    is not all there."""
    if "RANK" in os.environ:
        wanted = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if not os.environ.get(name)]
        if missing and not torch.distributed.is_initialized():
            raise UseError(
                f"RANK is set, as launchers do, but not {', '.join(missing)}; unset RANK to train in one process, "
                "or start the ranks with deepspeed, torchrun or srun"
            )
        return
    # srun sets it, sbatch alone does not; a shell in a job (srun --pty) is a single task, and its commands run alone.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise UseError(
                "under srun MASTER_ADDR must name the first host; start with launch/slurm.sbatch, which does"
            )
        slurm = {
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
            "LOCAL_WORLD_SIZE": _tasks_of_node(
                os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ.get("SLURM_NODEID", "0"))
            ),
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


def _tasks_of_node(tasks_per_node: str, node: int) -> str:
    """Tasks of the step's node of that number. tasks_per_node: as SLURM writes them, such as 8(x2),4."""
    parts = [part.partition("(x") for part in tasks_per_node.split(",")]
    return [tasks for tasks, _, times in parts for _ in range(int(times.rstrip(")") or 1))][node]


def torch_device(place: Place) -> torch.device:
    """Where this process computes."""
    return torch.device("cpu") if place.device_id is None else torch.device("cuda", place.device_id)


class Engine(Protocol):
    """What this trainer asks of DeepSpeed's engine, and of the replica that stands for it."""

    module: Classifier
    optimizer: Any
    """What steps: a torch optimizer, or DeepSpeed's around one. Its param_groups have the rates."""
    basic_optimizer: torch.optim.Optimizer
    """The torch optimizer in any case."""
    device: torch.device

    def __call__(self, *inputs: Tensor | None) -> Tensor: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> Any: ...
    def zero_optimization_stage(self) -> int: ...
    def fp16_enabled(self) -> bool: ...
    def get_global_grad_norm(self) -> float | Tensor | None: ...
    def destroy(self) -> None: ...


def build_optimizer(config: OptimConfig, model: Classifier) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW over the trainable parameters of a model.

    Parameters of one rate and decay make a group; the rate is set at each step, times the group's `rate_scale`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    layers = {} if config.layer_decay == 1 else layers_of(model)
    head, never = max(layers.values(), default=0), never_decayed(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = head - layers.get(name, head)
            decay = config.weight_decay if config.decay_all or is_decayed(name, parameter, never) else 0.0
            groups.setdefault((config.layer_decay**depth, decay), []).append(parameter)
    described = [
        {"params": parameters, "rate_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(described, config.lr, config.momentum, fused=True)
    return torch.optim.AdamW(described, config.lr, config.betas, fused=True)


def compile_mode(recipe: Recipe, device: torch.device, world_size: int) -> Compile:
    """What model.compile is for this recipe and place: none, kernels or graphs."""
    if recipe.model.compile != "auto":
        return recipe.model.compile
    if device.type != "cuda" or recipe.deepspeed.zero_stage == 3:
        return "none"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        log.warning("model.compile auto: none, as torch.compile needs a C compiler and there is none here; install gcc")
        return "none"
    return "kernels" if why_no_graphs(recipe, device.type, world_size) else "graphs"


def build_engine(model: Classifier, recipe: Recipe, place: Place, micro_batch: int) -> Engine:
    """The model on its device, ready for steps. Raises UseError for settings that do not go together."""
    device = torch_device(place)
    check_step(recipe, place.world_size, device.type)
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
    if recipe.deepspeed.zero_stage == 3:
        gather_whole_blocks(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = deepspeed_settings(recipe, place.world_size, micro_batch, parameters)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if (reader := _token_reader(model)) is not None:
        reader.go_last()  # behind DeepSpeed's hooks
    if place.world_size == 1 and recipe.deepspeed.zero_stage == 0:
        # One process has nothing to reduce, but DeepSpeed would copy all gradients into one buffer and back.
        engine.enable_backward_allreduce = False
    return engine


def gather_whole_blocks(model: Classifier) -> None:
    """Let ZeRO 3 gather and free the parameters of a block together, as one of DeepSpeed's "leaf modules": its hooks on
    every layer take more of the host's time than all else in a step.

    DeepSpeed reduces such a block's gradients when it has seen those of the block's output and input. The first that is
    trained may have an input without one, where what comes before is frozen. The last may have an output that nothing
    reads, where `TokenReader` has taken its [CLS] before. The gradients of these are reduced one by one.
    """
    backbone: nn.Module = getattr(model, "backbone", model)
    blocks, apart = blocks_of(backbone), set()
    first = next((block for block in blocks if any(parameter.requires_grad for parameter in block.parameters())), None)
    if first is not None:
        begin = next(first.parameters())
        before = takewhile(lambda parameter: parameter is not begin, backbone.parameters())
        if not all(parameter.requires_grad for parameter in before):
            apart.add(first)
    if _token_reader(model) is not None:
        apart.add(blocks[-1])
    for block in blocks:
        set_z3_leaf_module(block, block not in apart)


def _token_reader(model: Classifier) -> TokenReader | None:
    reader = getattr(getattr(model, "backbone", None), "token_reader", None)
    return reader if isinstance(reader, TokenReader) else None
