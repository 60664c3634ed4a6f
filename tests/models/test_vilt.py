"""ViLT: text embeddings, their place in the sequence, and padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.models.build import Classifier, build_model

VOCABULARY, TOKENS = 40, 8


def build(head: str = "cls", **settings: Any) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig("vit_tiny_patch16", head, "default", TOKENS, **settings)  # type: ignore[arg-type]
    return build_model(config, image_size=32, num_classes=5, vocab_size=VOCABULARY)[0].eval()


def batch(real: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples with `real` real tokens each, the rest padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    ids = torch.randint(1, VOCABULARY, (2, TOKENS), generator=generator)
    mask = torch.arange(TOKENS).expand(2, -1) < real
    return images, ids * mask, mask


@pytest.mark.parametrize("head", ["cls", "ifa"])
@torch.no_grad()
def test_padding_never_changes_the_logits_when_it_is_masked(head: str) -> None:
    model = build(head)
    images, ids, mask = batch(real=3)
    logits = model(images, ids, mask)
    other_ids = torch.where(mask, ids, VOCABULARY - 1)
    torch.testing.assert_close(model(images, other_ids, mask), logits, atol=1e-6, rtol=0)
    # Nor does it change them how long the padding is.
    torch.testing.assert_close(model(images, ids[:, :5], mask[:, :5]), logits, atol=1e-5, rtol=0)
    # Real tokens do.
    assert (model(images, torch.where(mask, VOCABULARY - 1, ids), mask) - logits).abs().max() > 1e-3


@torch.no_grad()
def test_padding_takes_part_in_attention_when_it_is_not_masked() -> None:
    model = build(mask_padding=False)
    images, ids, mask = batch(real=3)
    logits = model(images, ids, mask)
    assert (model(images, torch.where(mask, ids, VOCABULARY - 1), mask) - logits).abs().max() > 1e-3
    torch.testing.assert_close(model(images, ids), logits)  # the mask is not looked at


@torch.no_grad()
def test_masking_makes_no_difference_where_nothing_is_padding() -> None:
    images, ids, mask = batch(real=TOKENS)
    masked, unmasked = build(mask_padding=True), build(mask_padding=False)
    torch.testing.assert_close(masked(images, ids, mask), unmasked(images, ids, mask), atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", ["cls", "ifa"])
def test_a_text_of_padding_alone_gives_finite_logits_and_gradients(head: str) -> None:
    model = build(head)
    images, ids, mask = batch(real=0)
    logits = model(images, ids, mask)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())  # type: ignore[union-attr]


@torch.no_grad()
def test_the_sequence_is_cls_then_patches_with_positions_then_text() -> None:
    model = build()
    images, ids, mask = batch(real=3)
    seen: list[Tensor] = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(images, ids, mask)

    backbone, text = model.backbone, model.text
    positions = backbone.pos_embed
    patches = torch.nn.functional.conv2d(
        images, backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias, stride=16
    )
    summed = text.word.weight[ids] + text.position.weight + text.token_type.weight[0]
    expected = torch.cat(
        [
            (backbone.cls_token + positions[:, :1]).expand(2, -1, -1),
            patches.flatten(2).transpose(1, 2) + positions[:, 1:],
            torch.nn.functional.layer_norm(summed, (192,), eps=1e-6),
        ],
        dim=1,
    )
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


def test_text_embeddings_start_as_berts() -> None:
    torch.manual_seed(0)
    config = ModelConfig(backbone="vit_tiny_patch16", text_tokens=TOKENS)
    text = build_model(config, image_size=32, num_classes=2, vocab_size=5000)[0].text
    assert text.word.weight[0].abs().max() == 0
    assert text.word.weight[1:].std().item() == pytest.approx(0.02, rel=0.01)
    assert text.position.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert text.token_type.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert text.position.weight.shape == (TOKENS, 192)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "efficientnet_b0"])
def test_a_cnn_takes_neither_text_nor_the_ifa_head(backbone: str) -> None:
    with pytest.raises(UseError, match=f"model.text_tokens.*{backbone}"):
        build_model(ModelConfig(backbone=backbone, text_tokens=8), image_size=64, num_classes=2, vocab_size=10)
    with pytest.raises(UseError, match=f"model.head.*{backbone}"):
        build_model(ModelConfig(backbone=backbone, head="ifa"), image_size=64, num_classes=2)


def test_text_is_given_exactly_to_the_models_that_read_it() -> None:
    images, ids, mask = batch(real=3)
    with pytest.raises(ValueError, match="needs text_ids"):
        build()(images)
    with pytest.raises(ValueError, match="needs text_mask"):
        build()(images, ids)
    vision, _ = build_model(ModelConfig(backbone="vit_tiny_patch16"), image_size=32, num_classes=2)
    with pytest.raises(ValueError, match="takes none"):
        vision(images, ids, mask)


@pytest.mark.parametrize(
    ("key", "value"), [("text_tokens", -1), ("dropout", 1.0), ("dropout", -0.1), ("norm_eps", 0.0)]
)
def test_a_number_out_of_range_is_refused_by_key(key: str, value: float) -> None:
    with pytest.raises(UseError, match=f"model.{key} is {value}; it must be "):
        build_model(ModelConfig(backbone="vit_tiny_patch16", **{key: value}), image_size=32, num_classes=2)  # type: ignore[arg-type]
