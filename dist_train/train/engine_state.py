"""What a DeepSpeed engine has learned, as plain named tensors, and back.

Names and shapes are those of the model's parameters whatever the number of ranks, the ZeRO stage and the precision, so
that any other number, stage or precision can take them up. DeepSpeed's own checkpoints are pickles for one topology.
"""

from __future__ import annotations

from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from dist_train.train.engine import Engine

_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gather_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and optimizer state, copied to rank 0's memory; two empty dictionaries on the other ranks.

    All ranks call this together, between two steps; sharded tensors are brought together one at a time. Weights are the
    parameters (their float32 masters) and the buffers by their name in the model, floating ones as float32; optimizer
    state is by `KEY/NAME` of the parameter, as `exp_avg/head.weight`, scalars (`step/head.weight`) without dimensions.
    """
    rank = torch.distributed.get_rank()
    weights: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}

    def put(target: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if rank == 0:
            kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
            target[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()

    sharded = engine.zero_optimization_stage() > 0
    flat_state = _tensors_of(engine.basic_optimizer.state.get(_flat_masters(engine)[0], {})) if sharded else {}
    if flat_state and engine.zero_optimization_stage() < 3:
        # DeepSpeed links parameters to their state when it has stepped the first of its groups: the others have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    masters = {} if sharded else _masters(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                put(weights, name, parameter)
        elif sharded:
            put(weights, name, safe_get_full_fp32_param(parameter))
            for key, value in flat_state.items():
                whole = safe_get_full_optimizer_state(parameter, key) if value.ndim else value
                put(optimizer, f"{key}/{name}", whole)
        else:
            put(weights, name, masters[parameter])
            for key, value in _tensors_of(engine.basic_optimizer.state.get(masters[parameter], {})).items():
                put(optimizer, f"{key}/{name}", value)
    persistent = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in persistent:
            put(weights, name, buffer)
    return weights, optimizer


def restore_state(engine: Engine, weights: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
    """Give the engine the masters and the optimizer state that `gather_state` returned; all ranks call this with all
    of them. The engine's model must have been loaded with the weights before the engine was built.
    """
    parameters = {name: entry for name, entry in engine.module.named_parameters() if entry.requires_grad}
    inner = engine.basic_optimizer
    # torch keeps the step of a fused optimizer beside the parameters, of others on the CPU.
    beside = bool(inner.defaults.get("fused") or inner.defaults.get("capturable"))
    if engine.zero_optimization_stage() == 0:
        masters = _masters(engine)
        for name, parameter in parameters.items():
            master = masters[parameter]
            master.data.copy_(weights[name])
            for key in _keys(optimizer):
                value = optimizer.get(f"{key}/{name}")
                if value is not None:
                    inner.state[master][key] = value.to(master.device if value.ndim or beside else "cpu", copy=True)
        return
    _create_flat_state(engine, optimizer, parameters, beside)
    for name, parameter in parameters.items():
        _set_sharded(engine, parameter, weights[name], None)
        for key in _keys(optimizer):
            value = optimizer.get(f"{key}/{name}")
            if value is not None and value.shape == weights[name].shape:
                _set_sharded(engine, parameter, value, key)


def read_loss_scale(engine: Engine) -> dict[str, float]:
    """The numbers of fp16's loss scaler; {} where the precision has none."""
    scaler = _loss_scaler(engine)
    return {key: getattr(scaler, key) for key in _LOSS_SCALE if hasattr(scaler, key)}


def restore_loss_scale(engine: Engine, numbers: dict[str, float]) -> None:
    """Set what `read_loss_scale` returned; numbers that the scaler does not have are left out."""
    scaler = _loss_scaler(engine)
    for key in read_loss_scale(engine).keys() & numbers.keys():
        setattr(scaler, key, numbers[key])


def _loss_scaler(engine: Engine) -> Any:
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config


def _tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in sorted(state.items()) if torch.is_tensor(value)}


def _keys(optimizer: dict[str, Tensor]) -> list[str]:
    return sorted({name.partition("/")[0] for name in optimizer})


def _masters(engine: Engine) -> dict[nn.Parameter, Tensor]:
    """Without ZeRO: what the optimizer steps for each trainable parameter: itself, or fp16's float32 copy."""
    if hasattr(engine.optimizer, "fp32_groups"):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
    return {parameter: parameter for parameter in engine.module.parameters() if parameter.requires_grad}


def _flat_masters(engine: Engine) -> list[Tensor]:
    """Under ZeRO: this rank's part of the masters, several parameters in one flat tensor."""
    if engine.zero_optimization_stage() == 3:  # which takes them out of the optimizer's groups between two steps
        return engine.optimizer.fp32_partitioned_groups_flat
    return [flat for group in engine.basic_optimizer.param_groups for flat in group["params"]]


def _create_flat_state(
    engine: Engine, optimizer: dict[str, Tensor], parameters: dict[str, nn.Parameter], beside: bool
) -> None:
    """Under ZeRO: the optimizer state that the first step would create, scalars filled in, the rest zeros."""
    state = engine.basic_optimizer.state
    for key in _keys(optimizer):
        # A parameter without dimensions has state without dimensions: one that has some tells scalars apart.
        values = [optimizer[f"{key}/{name}"] for name in parameters if f"{key}/{name}" in optimizer]
        scalar = all(value.ndim == 0 for value in values)
        for flat in _flat_masters(engine):
            if scalar:
                state[flat][key] = values[0].to(flat.device if beside else "cpu", copy=True)
            else:
                state[flat][key] = torch.zeros_like(flat)
    if optimizer and engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # links the state to the parameters


def _set_sharded(engine: Engine, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Under ZeRO: set the master (key None) or an optimizer state of a parameter from the whole tensor."""
    if engine.zero_optimization_stage() < 3:
        value = value.to(parameter.device)
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own cut of a whole tensor fails where the ranks do not divide it: the last part is padded.
    part: Tensor = cast(Any, parameter).ds_tensor
    size = part.numel()
    start = torch.distributed.get_rank() * size
    mine = value.flatten()[start : start + size]
    mine = functional.pad(mine, (0, size - mine.numel())).to(part.device)
    if key is None:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)
