"""From the recipe's model section to a model: images, and text if it has any, in; logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.models.backbones import TokenTransformer, blocks_of
from dist_train.models.classifier import Classifier
from dist_train.models.heads import HEADS, OWN_PREFIXES, Features, head_name, initialise_head
from dist_train.models.lora import add_adapters, merged_weights
from dist_train.models.names import check_model, is_paper_name, vit_shape
from dist_train.models.parameter_groups import freeze
from dist_train.models.timm_models import build_timm, classifier_names, inspect
from dist_train.models.vilt import TextEmbeddings
from dist_train.models.weights import LoadReport, load_weights, to_plain_names


def build_model(
    config: ModelConfig, image_size: int, num_classes: int, vocab_size: int = 0, class_names: Sequence[str] = ()
) -> tuple[Classifier, LoadReport]:
    """The model of a recipe, in train mode, with its starting weights and an account of them.

    `image_size` is the side of the images, pixels; `vocab_size` the tokenizer's, needed if the model reads text;
    `class_names`, in id order, let starting weights that know their classes bring their classifier, or not. Initial
    values come from torch's global generator. Raises UseError for a combination that cannot be and, as `load_weights`,
    for weights that do not fit.
    """
    check_model(config, image_size)
    if config.text_tokens > 0 and vocab_size <= 0:
        raise ValueError("a model with text needs vocab_size")

    make_head = HEADS[config.head]
    backbone, dim, depth = _build_backbone(config, image_size, make_head.reads)
    text = None
    if config.text_tokens > 0:
        text = TextEmbeddings(vocab_size, config.text_tokens, dim, config.dropout, config.norm_eps)
    head = make_head(dim, depth, num_classes, config.norm_eps)
    initialise_head(head, config.head_init)

    model = Classifier(backbone, head, text, config.mask_padding)
    if config.checkpoint_blocks:
        model.recompute_blocks(True)
    own, classifiers = plain_weights(model), classifier_names(backbone)
    report = load_weights(own, config.weights, config.backbone, config.pos_resize, class_names, image_size, classifiers)
    if config.lora:
        add_adapters(model.backbone, config)
    model.frozen = freeze(model, config.freeze)
    return model.train(), report


def _build_backbone(config: ModelConfig, image_size: int, features: Features) -> tuple[nn.Module, int, int]:
    """The backbone, the channels of what it gives (the D of `heads.Features`), and its blocks, if it gives those."""
    shape = vit_shape(config.backbone)
    if shape is not None:
        vit = TokenTransformer(shape, image_size, features, config.dropout, config.norm_eps, config.drop_path)
        return vit, shape.dim, shape.depth
    # The paper's CNNs have no layer that model.dropout is about.
    dropout = 0.0 if is_paper_name(config.backbone) else config.dropout
    text = config.text_tokens > 0
    backbone = build_timm(config.backbone, image_size, features, config.drop_path, dropout, text)
    traits = inspect(config.backbone, image_size)
    return backbone, traits.pooled_dim if features == "pooled" else traits.token_dim, traits.depth


def compile_blocks(model: Classifier) -> None:
    """Run torch.compile, in place, on each block of a sequence of them (one is compiled and serves all) or on the whole
    of another backbone."""
    blocks = blocks_of(model.backbone)
    for module in blocks or [model.backbone]:
        if blocks and not isinstance(model.backbone, TokenTransformer):
            # Without the hooks on it (`timm_models.TokenReader`), which keep what they see.
            module.forward = torch.compile(module.forward, dynamic=False)
        else:
            module.compile(dynamic=False)


def compile_parts(model: Classifier) -> None:
    """Run torch.compile, in place, on the backbone, the text embeddings and the head, each as a whole: some faster than
    block by block, and in compiling that many times slower. Batches must be of one size.
    """
    if blocks_of(model.backbone) and model.backbone.grad_checkpointing:
        compile_blocks(model)  # the border of what is computed again
        return
    for part in (model.backbone, model.text, model.head):
        if part is not None:
            part.compile(dynamic=False)


def plain_weights(model: Classifier) -> dict[str, Tensor]:
    """The model's parameters and buffers (not copies) under plain names, in which weights are read and written.

    Backbone and CLS classifier: timm's names for that architecture (`blocks.0.norm1.weight`, `head.weight`; `fc.` or
    `classifier.` for a CNN). Another head: its own name first, as `ifa.aggregate.`, `ifa.norm.`, `ifa.classifier.`;
    text: `text.word.weight`, `text.position.weight`, `text.token_type.weight`, `text.norm.`. Of a layer with adapters
    (model.lora) it is a copy with them merged.
    """
    return to_plain_names(merged_weights(model), classifier_names(model.backbone)[0], head_name(model.head))


def to_timm_state_dict(model: Classifier) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights for timm, and what timm has no place for (names as in `plain_weights`); not copies, but for a
    second classifier.

    With the CLS head the first loads with strict=True into `timm.create_model(name, num_classes=C, **arguments)`,
    name and arguments from `backbones.timm_name`. With another head it lacks `head.`, and from a ViT under the paper's
    names `norm.`, which such a model does not have. The second holds such a head and the text embeddings and is empty
    for the others.
    """
    plain = plain_weights(model)
    first, *others = classifier_names(model.backbone)
    for other in others:
        for kind in ("weight", "bias"):
            if (tensor := plain.get(f"{first}.{kind}")) is not None:
                # timm takes the mean of several classifiers, as of DeiT's two, but adds what VOLO's auxiliary one says.
                # Copies: safetensors writes no two names of one memory.
                plain[f"{other}.{kind}"] = torch.zeros_like(tensor) if other == "aux_head" else tensor.clone()
    extra = {name: tensor for name, tensor in plain.items() if name.startswith(("text.", *OWN_PREFIXES.values()))}
    return {name: tensor for name, tensor in plain.items() if name not in extra}, extra
