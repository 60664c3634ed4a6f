"""Layers of a model by depth: which learn at a lower rate, which stay as they are, which weights decay."""

from __future__ import annotations

from torch import nn

from dist_train.models.classifier import Classifier

_EMBEDDING = ("backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.")
_NOT_DECAYED = ("backbone.cls_token", "backbone.pos_embed", "text.position.weight", "text.token_type.weight")


def layer_of(model: Classifier, name: str) -> int:
    """Layer of the parameter `name`: a ViT's embedding 0, its block i (from 0) i + 1, everything else one more than the
    last block. The text embeddings belong to everything else: like the head they start untrained."""
    if name.startswith(_EMBEDDING):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return head_layer(model)


def head_layer(model: Classifier) -> int:
    """The highest layer of a ViT, that of the head."""
    return len(model.backbone.blocks) + 1


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is meant for a parameter: not for biases, norms, the [CLS] token, position embeddings."""
    return parameter.ndim > 1 and name not in _NOT_DECAYED


def freeze(model: Classifier, which: str) -> list[nn.Module]:
    """Take gradients from what `which` names (see ModelConfig.freeze). Returns its modules, which are to stay in
    evaluation mode."""
    if which == "none":
        return []
    if which == "backbone":
        return [model.backbone.requires_grad_(False)]
    for name, parameter in model.named_parameters():
        if layer_of(model, name) <= int(which):
            parameter.requires_grad_(False)
    backbone = model.backbone
    return [backbone.patch_embed, backbone.pos_drop, *backbone.blocks[: int(which)]]
