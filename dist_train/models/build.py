"""From the recipe's model section to a model: images, and text if it has any, in; logits out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dist_train.config import ModelConfig
from dist_train.models.backbones import Backbone, TokenTransformer, create_cnn
from dist_train.models.classifier import Classifier
from dist_train.models.heads import HEAD_PREFIXES, CLSHead, HeadModule, IFAHead, initialise_head
from dist_train.models.lora import add_adapters, merged_weights
from dist_train.models.names import check_model, vit_shape
from dist_train.models.parameter_groups import freeze
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
    shape = vit_shape(config.backbone)
    if config.text_tokens > 0 and vocab_size <= 0:
        raise ValueError("a model with text needs vocab_size")

    backbone: Backbone
    head: HeadModule
    text = None
    if shape is None:
        backbone = create_cnn(config.backbone, config.drop_path)
        head = CLSHead(backbone.num_features, num_classes)
    else:
        backbone = TokenTransformer(
            shape,
            image_size,
            "cls" if config.head == "ifa" else "pooled",
            config.dropout,
            config.norm_eps,
            config.drop_path,
        )
        backbone.set_grad_checkpointing(config.checkpoint_blocks)
        if config.text_tokens > 0:
            text = TextEmbeddings(vocab_size, config.text_tokens, shape.dim, config.dropout, config.norm_eps)
        if config.head == "ifa":
            head = IFAHead(shape.dim, shape.depth, num_classes, config.norm_eps)
        else:
            head = CLSHead(shape.dim, num_classes)
    initialise_head(head, config.head_init)

    model = Classifier(backbone, head, text, config.mask_padding)
    report = load_weights(plain_weights(model), config.weights, config.backbone, config.pos_resize, class_names)
    if config.lora:
        add_adapters(model.backbone, config)
    model.frozen = freeze(model, config.freeze)
    return model.train(), report


def compile_blocks(model: Classifier) -> None:
    """Run torch.compile, in place, on each block of a ViT (one is compiled and serves all) or on the whole of a CNN."""
    for module in model.backbone.blocks if isinstance(model.backbone, TokenTransformer) else [model.backbone]:
        module.compile(dynamic=False)


def compile_parts(model: Classifier) -> None:
    """Run torch.compile, in place, on the backbone, the text embeddings and the head, each as a whole: some faster than
    block by block, and in compiling that many times slower. Batches must be of one size.
    """
    if isinstance(model.backbone, TokenTransformer) and model.backbone.grad_checkpointing:
        compile_blocks(model)  # the border of what is computed again
        return
    for part in (model.backbone, model.text, model.head):
        if part is not None:
            part.compile(dynamic=False)


def plain_weights(model: Classifier) -> dict[str, Tensor]:
    """The model's parameters and buffers (not copies) under plain names, in which weights are read and written.

    Backbone and CLS classifier: timm's names for that architecture (`blocks.0.norm1.weight`, `head.weight`; `fc.` or
    `classifier.` for a CNN). IFA head: `ifa.aggregate.`, `ifa.norm.`, `ifa.classifier.`; text: `text.word.weight`,
    `text.position.weight`, `text.token_type.weight`, `text.norm.`. Of a layer with adapters (model.lora) it is a copy
    with them merged.
    """
    return to_plain_names(merged_weights(model), getattr(model.backbone, "default_cfg", {}).get("classifier", "head"))


def to_timm_state_dict(model: Classifier) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights for timm, and what timm has no place for (names as in `plain_weights`); not copies.

    With the CLS head the first loads with strict=True into `timm.create_model(name, num_classes=C, **arguments)`,
    name and arguments from `backbones.timm_name`. With the IFA head it lacks `norm.` and `head.`, which such a
    model does not have. The second holds the IFA head and the text embeddings and is empty for the others.
    """
    plain = plain_weights(model)
    extra = {name: tensor for name, tensor in plain.items() if name.startswith(("text.", *HEAD_PREFIXES.values()))}
    return {name: tensor for name, tensor in plain.items() if name not in extra}, extra
