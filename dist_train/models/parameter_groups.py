"""Layers of a model by depth: which learn at a lower rate, which stay as they are, which weights decay."""

from __future__ import annotations

from torch import nn

from dist_train.models.backbones import TokenTransformer
from dist_train.models.classifier import Classifier
from dist_train.models.timm_models import layers_by_timm

_EMBEDDING = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.")
_NOT_DECAYED = ("backbone.cls_token", "backbone.pos_embed", "text.position.weight", "text.token_type.weight")


def layers_of(model: Classifier) -> dict[str, int]:
    """Layer of each parameter by name. The embedding or stem is 0; the head, which is the highest, and the text
    embeddings are one more than the backbone's last: both start untrained.

    Of a ViT under the paper's names block i (from 0) is i + 1, and its final norm learns as the head does. Of any other
    backbone the layers are those of timm's own group matcher.
    """
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model.backbone, TokenTransformer):
        head = len(model.backbone.blocks) + 1
        return {name: _layer_in_vit(name, head) for name in names}
    own = [name.removeprefix("backbone.") for name in names if name.startswith("backbone.")]
    layers, head = layers_by_timm(model.backbone, own)
    return {name: layers.get(name.removeprefix("backbone."), head) for name in names}


def _layer_in_vit(name: str, head: int) -> int:
    if name.startswith(_EMBEDDING):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return head


def never_decayed(model: Classifier) -> frozenset[str]:
    """Parameters of a backbone that weight decay is not meant for, beside biases and norms, as timm says."""
    say = getattr(getattr(model, "backbone", None), "no_weight_decay", set)
    return frozenset(f"backbone.{name}" for name in say())


def is_decayed(name: str, parameter: nn.Parameter, never: frozenset[str] = frozenset()) -> bool:
    """Whether weight decay is meant for a parameter: not for biases, norms, the [CLS] token, position embeddings, nor
    for those of `never_decayed`."""
    return parameter.ndim > 1 and name not in _NOT_DECAYED and name not in never


def freeze(model: Classifier, which: str) -> list[nn.Module]:
    """Take gradients from what `which` names (see ModelConfig.freeze). Returns its modules, which are to stay in
    evaluation mode."""
    if which == "none":
        return []
    if which == "backbone":
        return [model.backbone.requires_grad_(False)]
    layers = layers_of(model)
    for name, parameter in model.named_parameters():
        if layers[name] <= int(which):
            parameter.requires_grad_(False)
    backbone = model.backbone
    if isinstance(backbone, TokenTransformer):
        return [backbone.patch_embed, backbone.pos_drop, *backbone.blocks[: int(which)]]
    dropout = getattr(backbone, "pos_drop", None)  # before the first block
    return [*([dropout] if isinstance(dropout, nn.Module) else []), *_wholly_frozen(backbone)]


def _wholly_frozen(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a module that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in _wholly_frozen(child)]
