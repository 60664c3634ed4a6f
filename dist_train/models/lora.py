"""LoRA (Hu et al. 2022) by the `peft` library: a frozen backbone whose linear layers learn a change of low rank.

A layer's output W x + b becomes W x + b + (alpha / rank) B A x, with A (rank, in) drawn as peft draws it and B (out,
rank) zero, so that training starts from the backbone as it was. Checkpoints keep W, A and B; whatever leaves a run as
plain weights has them merged: W + (alpha / rank) B A, under timm's name of W.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Literal

from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.errors import UseError

log = logging.getLogger(__name__)

_BASE, _A, _B = "base_layer.", "lora_A.default.weight", "lora_B.default.weight"
"""What peft calls the frozen layer and the two adapters inside of the layer that it puts in its place."""


def lora_scale(rank: int, alpha: int) -> float:
    """What the product of the adapters is multiplied by: alpha / rank, where alpha 0 stands for twice the rank."""
    return (alpha or 2 * rank) / rank


def lora_layers(backbone: nn.Module, targets: Literal["all", "attention"]) -> list[str]:
    """Names of the linear layers within the blocks of a timm model that take adapters.

    `all`: attention and MLP, as QLoRA (Dettmers et al. 2023) found necessary to match full fine-tuning, and what peft
    calls all-linear; `attention`: queries, keys, values and projection alone, as in the LoRA paper. timm names both the
    same way in all families: `blocks` somewhere in the name, behind it `attn` or something else.
    """
    found = []
    for name, module in backbone.named_modules():
        _, within, place = f".{name}".partition(".blocks.")
        if within and isinstance(module, nn.Linear) and (targets == "all" or ".attn" in f".{place}"):
            found.append(name)
    return found


def add_adapters(backbone: nn.Module, config: ModelConfig) -> None:
    """Freeze the backbone, in place, and give its linear layers adapters of rank `config.lora`, which train.

    Initial values come from torch's global generator. Raises UseError where it has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and only such runs need it
    from peft.tuners.lora import LoraLayer

    names = lora_layers(backbone, config.lora_targets)
    if not names:
        wanted = "linear layers" if config.lora_targets == "all" else "attention"
        raise UseError(f"model.lora: {config.backbone} has no {wanted} in blocks for adapters; use 0 and model.freeze")
    backbone.requires_grad_(False)
    pattern = "|".join(re.escape(name) for name in names)  # of whole names: peft takes those of a list as endings
    alpha = config.lora_alpha or 2 * config.lora
    inject_adapter_in_model(LoraConfig(r=config.lora, lora_alpha=alpha, target_modules=pattern), backbone)
    for module in backbone.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # the precision of a run is set elsewhere, for all layers alike
        if hasattr(module, "qkv_bias_separate"):
            # BEiT, EVA and Swin v2 would use the weight of `qkv` without calling it, past its adapters.
            module.qkv_bias_separate = True  # type: ignore[assignment]
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in backbone.parameters())
    log.info(
        "LoRA of rank %d, alpha %d, on %d linear layers: %.3g M of the backbone's %.3g M numbers are trained",
        config.lora,
        alpha,
        len(names),
        trained / 1e6,
        whole / 1e6,
    )


def merge_adapters(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors of a model or checkpoint with each layer's adapters added to its weight, under the names that there
    are without adapters. Weights with adapters are copies, the others as they were; without any, all are."""
    merged = {}
    for name, tensor in tensors.items():
        stem, is_base, of_layer = name.rpartition(_BASE)
        if name.endswith((_A, _B)):
            continue
        if is_base and of_layer == "weight" and stem + _A in tensors:
            change = tensors[stem + _B].float() @ tensors[stem + _A].float()
            tensor = (tensor.float() + scale * change).to(tensor.dtype)
        merged[stem + of_layer if is_base else name] = tensor
    return merged


def scale_of_recipe(recipe: dict[str, Any]) -> float:
    """`lora_scale` of a recipe as a checkpoint has it; 1 where it has no adapters."""
    model = recipe.get("model", {})
    return lora_scale(model["lora"], model["lora_alpha"]) if model.get("lora") else 1.0


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dictionary with its adapters merged; not copies but for those weights."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    return merge_adapters(model.state_dict(), layers[0].scaling["default"] if layers else 1.0)
