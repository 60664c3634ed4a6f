"""LoRA's adapters in models of several families: which layers have them, that all of them learn, and their merging."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.models.lora import add_adapters, lora_layers, lora_scale, merged_weights

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 16}
FAMILIES = {
    "vit_tiny_patch16_224": TINY,
    "deit3_small_patch16_224": TINY,
    "vit_small_patch14_dinov2": TINY,
    "vit_small_patch16_dinov3": TINY,
    "vit_base_patch16_siglip_224": TINY,
    "beit_base_patch16_224": TINY,
    "eva02_tiny_patch14_224": TINY,
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1)},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1)},
}
"""timm models, so small that a test takes no time."""


def small_model(name: str) -> nn.Module:
    """With values as after training: at first some families scale the branches of their blocks to nearly nothing."""
    torch.manual_seed(1)
    options = {"num_heads": (1, 1, 1, 1)} if "swin" in name else {}
    model = timm.create_model(name, num_classes=5, **FAMILIES[name], **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_change_nothing_at_first_then_all_of_them_learn_and_merge_into_timms_names(name: str) -> None:
    model, plain = small_model(name), small_model(name)
    images = torch.randn(3, 3, FAMILIES[name]["img_size"], FAMILIES[name]["img_size"])
    add_adapters(model, ModelConfig(backbone=name, lora=3, lora_alpha=12))
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-6)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(lora_layers(plain, "all")) > 0
    assert all(".lora_" in name for name in trained)

    with torch.no_grad():
        for name_of, parameter in trained.items():
            if ".lora_B." in name_of:
                nn.init.normal_(parameter, std=0.2)
    logits = model(images)
    logits.square().sum().backward()
    unused = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert unused == []
    assert (logits - plain(images)).abs().max() > 0.001  # so that what follows says something

    merged = merged_weights(model)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(images), logits, rtol=1e-5, atol=1e-5)


def test_attention_alone_and_all_linear_layers_of_the_blocks() -> None:
    model = small_model("vit_tiny_patch16_224")
    attention = [f"blocks.{block}.attn.{layer}" for block in range(2) for layer in ("qkv", "proj")]
    assert lora_layers(model, "attention") == attention
    assert set(lora_layers(model, "all")) == {
        *attention,
        *(f"blocks.{block}.mlp.fc{layer}" for block in range(2) for layer in (1, 2)),
    }
    config = ModelConfig(lora=2, lora_targets="attention")
    add_adapters(model, config)
    assert {name.partition(".lora_")[0] for name, value in model.named_parameters() if value.requires_grad} == set(
        attention
    )


def test_what_adapters_add_is_multiplied_by_alpha_over_rank() -> None:
    assert (lora_scale(8, 0), lora_scale(8, 8), lora_scale(4, 16)) == (2, 1, 4)
    model = small_model("vit_tiny_patch16_224")
    weight = model.blocks[0].mlp.fc1.weight.double()
    add_adapters(model, ModelConfig(lora=4, lora_alpha=16))
    layer = model.blocks[0].mlp.fc1
    nn.init.normal_(layer.lora_B["default"].weight)
    change = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    merged = merged_weights(model)["blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(merged.double(), weight + 4 * change, rtol=1e-5, atol=1e-6)


def test_a_model_without_linear_layers_in_blocks_is_refused() -> None:
    with pytest.raises(UseError, match=r"model\.lora: convnext_atto has no linear layers in blocks"):
        add_adapters(timm.create_model("convnext_atto", num_classes=0), ModelConfig(backbone="convnext_atto", lora=8))
