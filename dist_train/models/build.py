"""From the recipe's model section to a model: images, and text if it has any, in; logits out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.models.backbones import TokenTransformer, create_cnn
from dist_train.models.heads import CLSHead, IFAHead, initialise_head
from dist_train.models.names import check_model, vit_shape
from dist_train.models.parameter_groups import freeze
from dist_train.models.vilt import TextEmbeddings, keep_padding_out
from dist_train.models.weights import LoadReport, load_weights


class Classifier(nn.Module):
    """Backbone, head, and text embeddings for a ViLT (`text` is None for a model of images alone)."""

    def __init__(
        self, backbone: nn.Module, head: CLSHead | IFAHead, text: TextEmbeddings | None, mask_padding: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text
        self.head = head
        self.mask_padding = mask_padding
        self.frozen: list[nn.Module] = []
        """Parts that stay in evaluation mode."""
        self.autocast: torch.dtype | None = None
        """What torch's autocast computes matrix products in; None: the type of the weights."""

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`, but frozen parts neither drop anything nor change their running statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W), float.

        A ViLT also needs `text_ids` (B, T), int64, and `text_mask` (B, T), bool, True for real tokens; a model of
        images alone takes neither. Raises ValueError where that is not so.
        """
        # In here and not around the model: DeepSpeed's engine switches an autocast around it off, on GPUs alone.
        with nullcontext() if self.autocast is None else torch.autocast(images.device.type, self.autocast):
            return self._logits(images, text_ids, text_mask)

    def _logits(self, images: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        if (text_ids is None) != (self.text is None):
            raise ValueError("a ViLT needs text_ids; a model of images alone takes none")
        if self.text is None:
            return self.head(self.backbone(images))
        attention_mask = None
        if self.mask_padding:
            if text_mask is None:
                raise ValueError("mask_padding needs text_mask")
            attention_mask = keep_padding_out(text_mask, image_tokens=1 + self.backbone.patch_embed.num_patches)
        return self.head(self.backbone(images, self.text(text_ids), attention_mask))


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

    text = None
    if shape is None:
        backbone = create_cnn(config.backbone, config.drop_path)
        head: CLSHead | IFAHead = CLSHead(backbone.num_features, num_classes)
    else:
        backbone = TokenTransformer(
            shape, image_size, config.head == "ifa", config.dropout, config.norm_eps, config.drop_path
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
    `text.position.weight`, `text.token_type.weight`, `text.norm.`.
    """
    if isinstance(model.head, IFAHead):
        new_prefixes = {"backbone.": "", "head.": "ifa.", "text.": "text."}
    else:
        classifier = getattr(model.backbone, "default_cfg", {}).get("classifier", "head")
        new_prefixes = {"backbone.": "", "head.classifier.": f"{classifier}.", "text.": "text."}
    plain = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in new_prefixes if name.startswith(prefix))
        plain[new_prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return plain


def to_timm_state_dict(model: Classifier) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's weights for timm, and what timm has no place for (names as in `plain_weights`); not copies.

    With the CLS head the first loads with strict=True into `timm.create_model(name, num_classes=C, **arguments)`,
    name and arguments from `backbones.timm_name`. With the IFA head it lacks `norm.` and `head.`, which such a
    model does not have. The second holds the IFA head and the text embeddings and is empty for the others.
    """
    plain = plain_weights(model)
    extra = {name: tensor for name, tensor in plain.items() if name.startswith(("ifa.", "text."))}
    return {name: tensor for name, tensor in plain.items() if name not in extra}, extra
