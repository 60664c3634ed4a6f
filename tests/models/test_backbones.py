"""Backbones: names, sizes, and agreement with timm's own models."""

import pytest
import timm
import torch
from torch import nn

from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.models.backbones import timm_name
from dist_train.models.build import build_model, plain_weights, to_timm_state_dict
from dist_train.models.names import vit_shape


def count_parameters(backbone: str, head: str) -> int:
    with torch.device("meta"):
        model, _ = build_model(ModelConfig(backbone=backbone, head=head), image_size=128, num_classes=3263)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("backbone", "depth", "expected"),
    [
        ("vit_base_patch16", 12, 88_206_527),
        ("vit_base_patch32", 12, 89_939_135),
        ("vit_large_patch16", 24, 306_511_039),
        ("vit_large_patch32", 24, 308_821_183),
    ],
)
def test_parameter_counts_are_the_papers_and_ifa_adds_one_per_block_and_a_bias(
    backbone: str, depth: int, expected: int
) -> None:
    assert count_parameters(backbone, "cls") == expected
    assert count_parameters(backbone, "ifa") == expected + depth + 1


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [
        ("vit_tiny_patch16", 64),
        ("vit_tiny_patch8", 32),
        ("vit_small_patch32", 96),
        ("resnet18", 64),
        ("resnet50", 64),
        ("efficientnet_b0", 64),
    ],
)
def test_weights_load_strictly_into_timm_and_give_its_logits(backbone: str, image_size: int) -> None:
    torch.manual_seed(1)
    model, _ = build_model(ModelConfig(backbone=backbone, head_init="default"), image_size, num_classes=7)
    name, arguments = timm_name(backbone, image_size)
    reference = timm.create_model(name, num_classes=7, **arguments)
    weights, extra = to_timm_state_dict(model)
    reference.load_state_dict(weights, strict=True)
    assert extra == {}
    images = torch.randn(3, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), reference.eval()(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_sizes_are_timms(size: str) -> None:
    with torch.device("meta"):
        reference = timm.create_model(f"vit_{size}_patch16_224")
    shape = vit_shape(f"vit_{size}_patch16")
    assert shape is not None
    theirs = (reference.embed_dim, len(reference.blocks), reference.blocks[0].attn.num_heads)
    assert (shape.dim, shape.depth, shape.heads) == theirs


def test_timm_name_uses_timms_own_name_where_there_is_one() -> None:
    assert timm_name("vit_base_patch16", 128) == ("vit_base_patch16_224", {"img_size": 128})
    assert timm_name("vit_tiny_patch8", 64) == ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8})
    assert timm_name("resnet18", 64) == ("resnet18", {})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("vit_bse_patch16", "vit_base_patch16"),
        ("resnet-18", "resnet18"),
        ("vit_tiny", "vit_tiny_patch16"),
        ("vit_tiny_patch0", "vit_tiny_patch"),
        ("google/vit-base-patch16-224", "vit_base_patch16_224"),
        ("vit_small_patch33_224.augreg_in21k", "vit_small_patch32_224"),
    ],
)
def test_an_unknown_backbone_is_refused_with_what_was_probably_meant(wrong: str, nearest: str) -> None:
    with pytest.raises(UseError, match=rf"model.backbone.*did you mean {nearest}.*\? There are resnet18, ") as caught:
        build_model(ModelConfig(backbone=wrong), image_size=64, num_classes=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("foreign", ["yolo", "", "vit", "my own model!"])
def test_a_backbone_like_none_there_is_is_refused_with_no_guess(foreign: str) -> None:
    with pytest.raises(UseError, match=r"is unknown; there are resnet18, resnet50, .* and what `dist-train models`"):
        build_model(ModelConfig(backbone=foreign), image_size=64, num_classes=2)


def test_a_patch_that_does_not_divide_the_image_is_refused_with_sizes_that_would_do() -> None:
    with pytest.raises(UseError, match=r"patches of 16 pixels.*image_size 100.*96 or 112.*4, 5, 10, 20, 25, 50, 100"):
        build_model(ModelConfig(backbone="vit_tiny_patch16"), image_size=100, num_classes=2)
    with pytest.raises(UseError, match="an image size of 32 would do"):
        build_model(ModelConfig(backbone="vit_tiny_patch32"), image_size=16, num_classes=2)


def test_dropout_and_epsilon_reach_every_layer_that_has_them() -> None:
    config = ModelConfig(backbone="vit_tiny_patch16", head="ifa", text_tokens=4, dropout=0.1, norm_eps=1e-4)
    model, _ = build_model(config, image_size=32, num_classes=2, vocab_size=10)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * 12 + 2
    assert {norm.eps for norm in norms} == {1e-4}
    probabilities = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    without = {"backbone.head_drop"} | {f"backbone.blocks.{block}.attn.attn_drop" for block in range(12)}
    assert {name for name, p in probabilities.items() if p == 0.1} == probabilities.keys() - without
    assert {"backbone.pos_drop", "backbone.blocks.0.attn.proj_drop", "backbone.blocks.0.mlp.drop1"} < (
        probabilities.keys() - without
    )


def test_the_initial_values_follow_torchs_seed() -> None:
    def tensors(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        config = ModelConfig(backbone="vit_tiny_patch16", head="ifa", text_tokens=4)
        return plain_weights(build_model(config, image_size=32, num_classes=5, vocab_size=10)[0])

    first, again, other = tensors(3), tensors(3), tensors(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["text.word.weight"], other["text.word.weight"])
    assert not torch.equal(first["ifa.classifier.weight"], other["ifa.classifier.weight"])
