"""Any timm model as a backbone: what it is found to do, against timm's own models called by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.errors import UseError, WorkError
from dist_train.models.backbones import timm_name
from dist_train.models.build import Classifier, build_model, to_timm_state_dict
from dist_train.models.names import CNNS, abilities
from dist_train.models.parameter_groups import layers_of
from dist_train.models.pretrained import hub_name
from dist_train.models.timm_models import create, inspect
from tests.models.timm_families import FAMILIES

CLASSES = 5
PER_BLOCK = [name for name, family in FAMILIES.items() if family.per_block]
WITH_TEXT = [name for name, family in FAMILIES.items() if family.text]
TOKENS = [name for name, family in FAMILIES.items() if family.blocks]
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str, image_size: int = 0, vocab_size: int = 0, **settings: object) -> Classifier:
    """A model whose every parameter is drawn: timm starts some at 0 or 1, behind which errors would hide."""
    torch.manual_seed(3)
    config = ModelConfig(backbone=name, head_init="default", **settings)  # type: ignore[arg-type]
    model = build_model(config, image_size or FAMILIES[name].image_size, CLASSES, vocab_size)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(name: str, count: int = 4) -> Tensor:
    side = FAMILIES[name].image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@every_family
def test_what_a_family_can_do_is_found_by_looking_at_it(name: str) -> None:
    family = FAMILIES[name]
    can = abilities(name, family.image_size)
    assert (can.tokens, can.per_block, can.text) == (family.blocks > 0, family.per_block, family.text)
    assert can.batch_norms == family.batch_norms
    assert inspect(name, family.image_size).depth == family.blocks


def test_looking_at_a_model_draws_no_random_number() -> None:
    torch.manual_seed(8)
    expected = torch.randn(3)
    inspect.cache_clear()
    torch.manual_seed(8)
    inspect("tiny_vit", 32)
    assert torch.equal(torch.randn(3), expected)


@every_family
def test_a_training_step_reaches_all_that_is_trained_and_timms_model_has_the_same_logits(name: str) -> None:
    model = build(name)
    model(images(name)).square().sum().backward()
    idle = [key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [key for key in idle if not key.endswith(("k.bias", "k_norm.bias"))] == []
    architecture, arguments = timm_name(name, FAMILIES[name].image_size)
    reference = timm.create_model(architecture, num_classes=CLASSES, **arguments)
    weights, extra = to_timm_state_dict(model)
    reference.load_state_dict(weights, strict=True)
    assert extra == {}
    with torch.no_grad():
        expected = reference.eval()(images(name))
        assert expected.std() > 0.01
        torch.testing.assert_close(model.eval()(images(name)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, family.image_size) for name, family in FAMILIES.items()),
        *((name, 64) for name in ("ghostnet_050", "rexnet_100", "legacy_seresnet18", "nest_tiny")),
        ("swinv2_tiny_window8_256", 64),
        ("vit_relpos_small_patch16_224", 64),
    ],
)
def test_nothing_is_left_to_chance_where_the_recipe_says_0(name: str, side: int) -> None:
    """timm's own defaults: stochastic depth of 0.1 to 0.5, dropout of 0.125 to 0.2."""
    torch.manual_seed(5)
    model, pixels = create(name, side).train(), torch.randn(16, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), model(pixels), rtol=0, atol=0)


def test_a_model_of_two_classifiers_has_one_of_ours_twice_each_with_memory_of_its_own() -> None:
    model, _ = build_model(ModelConfig(backbone="deit_tiny_distilled_patch16_224"), 32, CLASSES)
    weights, _ = to_timm_state_dict(model)
    assert torch.equal(weights["head.weight"], weights["head_dist.weight"])
    assert set(load(save(weights))) == set(weights)


@torch.no_grad()
def test_volos_auxiliary_classifier_adds_nothing() -> None:
    model, _ = build_model(ModelConfig(backbone="volo_d1_224", head_init="default"), 64, CLASSES)
    name, arguments = timm_name("volo_d1_224", 64)
    reference = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
    reference.load_state_dict(to_timm_state_dict(model)[0])
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(pixels), reference(pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", PER_BLOCK)
def test_every_blocks_cls_is_what_the_block_gives(name: str) -> None:
    """timm's `forward_intermediates` is written independently of its forward and of our hooks."""
    model = build(name, head="ifa").eval()
    reference = model.backbone
    with torch.no_grad():
        ours = model.backbone(images(name))
        maps = reference.forward_intermediates(
            images(name), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    expected = torch.stack([prefix[:, 0] for _, prefix in maps], dim=-1)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", PER_BLOCK)
def test_averages_are_of_the_patches_alone(name: str) -> None:
    from dist_train.models.timm_models import build_timm

    torch.manual_seed(0)
    backbone = build_timm(name, FAMILIES[name].image_size, "cls_and_average").eval()
    with torch.no_grad():
        ours = backbone(images(name))
        maps = backbone.forward_intermediates(
            images(name), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    expected = torch.stack([torch.cat([prefix[:, 0], patches.mean(1)], 1) for patches, prefix in maps], dim=-1)
    torch.testing.assert_close(ours, expected)


def gradients(model: Classifier, *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PER_BLOCK)
def test_recomputed_blocks_give_the_same_gradients_with_every_block_read(name: str) -> None:
    model = build(name, head="ifa")
    expected = gradients(model, images(name))
    model.backbone.set_grad_checkpointing(True)
    for key, gradient in gradients(model, images(name)).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", PER_BLOCK)
def test_compiled_blocks_give_the_same_gradients_with_every_block_read(name: str) -> None:
    model = build(name, head="ifa")
    expected = gradients(model, images(name))
    for block in model.backbone.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for key, gradient in gradients(model, images(name)).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.slow
@every_family
def test_a_whole_backbone_is_compiled_to_the_same_gradients(name: str) -> None:
    model = build(name, head="ifa" if FAMILIES[name].per_block else "cls")
    expected = gradients(model, images(name))
    torch._dynamo.reset()
    model.backbone.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for key, gradient in gradients(model, images(name)).items():
        torch.testing.assert_close(gradient, expected[key], msg=key, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", ["cls", "ifa"])
def test_timms_vit_with_text_is_the_papers_vilt(head: str) -> None:
    """The same weights under both names; the paper's transformer has code of its own."""
    batch = (torch.randn(3, 3, 32, 32), torch.randint(1, 20, (3, 5)), torch.arange(5).expand(3, -1) < 3)
    papers, timms = (
        build(name, 32, 20, head=head, text_tokens=5) for name in ("vit_tiny_patch16", "vit_tiny_patch16_224")
    )
    timms.load_state_dict(papers.state_dict(), strict=False)
    expected = gradients(papers, *batch)
    for key, gradient in gradients(timms, *batch).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    torch.testing.assert_close(timms(*batch), papers(*batch))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_tags_matter_and_padding_does_not(name: str) -> None:
    model = build(name, vocab_size=20, text_tokens=4, checkpoint_blocks=True).eval()
    mask = torch.tensor([[True, True, False, False]] * 4)
    ids = torch.tensor([[3, 4, 0, 0]] * 4)
    with torch.no_grad():
        logits = model(images(name), ids, mask)
        padded = model(images(name), torch.tensor([[3, 4, 9, 8]] * 4), mask)
        others = model(images(name), torch.tensor([[5, 6, 0, 0]] * 4), mask)
    assert torch.equal(logits, padded)
    assert (logits - others).abs().max() > 1e-4


# ---------------------------------------------------------------- weights
@every_family
def test_a_file_at_another_size_is_fitted_as_timm_fits_it(name: str, tmp_path: Path) -> None:
    """The reference is a model of the file's size that timm's `set_input_size` changes; Swin's, which would take
    other windows too, is only held to the shapes."""
    family = FAMILIES[name]
    pretrained = build(name, image_size=2 * family.image_size)
    weights, _ = to_timm_state_dict(pretrained)
    save_file({key: tensor.clone() for key, tensor in weights.items()}, tmp_path / "w.safetensors")
    torch.manual_seed(0)
    config = ModelConfig(backbone=name, weights=str(tmp_path / "w.safetensors"))
    model, report = build_model(config, family.image_size, CLASSES)
    assert report.new == [] and report.unused == []
    architecture, arguments = timm_name(name, 2 * family.image_size)
    reference = timm.create_model(architecture, num_classes=CLASSES, **arguments)
    reference.load_state_dict(weights)
    if name == "tiny_swin":
        assert report.resized and all(key.endswith("relative_position_bias_table") for key in report.resized)
        return
    if family.blocks:
        reference.set_input_size((family.image_size, family.image_size))
    assert bool(report.resized) == any(
        weights[key].shape != tensor.shape for key, tensor in reference.state_dict().items()
    )
    with torch.no_grad():
        expected = reference.eval()(images(name))
        torch.testing.assert_close(model.eval()(images(name)), expected, atol=1e-4, rtol=1e-3)


def test_the_rest_of_a_head_that_timm_drops_is_left_over(tmp_path: Path) -> None:
    save_file(timm.create_model("levit_128s").state_dict(), tmp_path / "w.safetensors")
    config = ModelConfig(backbone="levit_128s", weights=str(tmp_path / "w.safetensors"))
    _, report = build_model(config, 224, CLASSES)
    assert report.new == ["head.linear.weight", "head.linear.bias"] and "head.bn.weight" in report.unused


@pytest.mark.parametrize(("name", "side"), [("deit_tiny_distilled_patch16_224", 32), ("levit_128s", 224)])
def test_a_checkpoint_comes_back_whole_whatever_timm_has_for_a_head(name: str, side: int, tmp_path: Path) -> None:
    first, _ = build_model(ModelConfig(backbone=name, head_init="default"), side, CLASSES)
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    second, report = build_model(ModelConfig(backbone=name, weights=str(tmp_path / "w.safetensors")), side, CLASSES)
    assert report.new == report.unused == []
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())


def test_a_file_of_another_family_or_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    weights, _ = to_timm_state_dict(build("tiny_deit3"))
    missing = {key: tensor.clone() for key, tensor in weights.items() if key != "blocks.1.ls1.gamma"}
    save_file(missing, tmp_path / "missing.safetensors")
    save_file({key: tensor.clone() for key, tensor in weights.items()}, tmp_path / "other.safetensors")
    for file, name, what in (("missing", "tiny_deit3", "blocks.1.ls1.gamma"), ("other", "tiny_vit", "ls1.gamma")):
        with pytest.raises(WorkError, match=what) as caught:
            build_model(ModelConfig(backbone=name, weights=str(tmp_path / f"{file}.safetensors")), 32, CLASSES)
        assert "\n" not in str(caught.value) and f"does not fit {name}" in str(caught.value)


def test_hub_takes_the_tag_in_the_name_or_timms_default() -> None:
    assert hub_name("vit_base_patch14_dinov2.lvd142m") == "vit_base_patch14_dinov2.lvd142m"
    default = timm.get_pretrained_cfg("vit_base_patch16_siglip_224").tag
    assert hub_name("vit_base_patch16_siglip_224") == f"vit_base_patch16_siglip_224.{default}"
    assert hub_name("convnext_tiny", "fb_in22k") == "convnext_tiny.fb_in22k"
    with pytest.raises(UseError, match="no weights fb_in23k for convnext_tiny; the nearest is hub:fb_in22k"):
        hub_name("convnext_tiny", "fb_in23k")
    with pytest.raises(UseError, match=r"not the tag in model\.backbone"):
        hub_name("convnext_tiny.fb_in22k", "in12k")
    with pytest.raises(UseError, match="no pretrained weights for tiny_vit"):
        hub_name("tiny_vit")


# ---------------------------------------------------------------- layers
@every_family
def test_layers_are_those_of_timms_own_layer_decay(name: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = build(name)
    architecture, arguments = timm_name(name, FAMILIES[name].image_size)
    reference = timm.create_model(architecture, num_classes=CLASSES, **arguments)
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(reference, layer_decay=0.5)
        for parameter in group["params"]
    }
    layers = layers_of(model)
    head = max(layers.values())
    ours = {key.removeprefix("backbone."): 0.5 ** (head - layer) for key, layer in layers.items()}
    for key, parameter in reference.named_parameters():
        if key in ours:
            assert ours[key] == scales[id(parameter)], key
    assert abilities(name, FAMILIES[name].image_size).layers == head - 1


@every_family
def test_frozen_layers_have_no_gradient_and_stay_in_evaluation_mode(name: str) -> None:
    model = build(name, freeze="1", drop_path=0.2).train()
    layers = layers_of(model)
    for key, parameter in model.named_parameters():
        if parameter.ndim and layers[key] <= 1:
            assert not parameter.requires_grad, key
        elif key.startswith("head."):
            assert parameter.requires_grad, key
    running = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model(images(name))
    owners = dict(model.named_modules())
    for key, buffer in model.named_buffers():
        owner = owners[key.rpartition(".")[0]]
        if isinstance(owner, nn.modules.batchnorm._BatchNorm):
            frozen = layers[f"{key.rpartition('.')[0]}.weight"] <= 1
            assert torch.equal(buffer, running[key]) == frozen, key
            assert owner.training != frozen


@pytest.mark.parametrize("name", CNNS)
def test_the_layers_of_the_papers_cnns_are_timms(name: str) -> None:
    assert CNNS[name] == inspect(name, 64).can.layers
    assert inspect(name, 64).can == abilities(name, 64)


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("backbone", "settings", "image_size", "line"),
    [
        ("convnext_tinny", {}, 64, "model.backbone: 'convnext_tinny' is unknown; did you mean convnext_tiny?"),
        ("convnext_tiny.fb_in22kk", {}, 64, "timm has no weights 'fb_in22kk' of convnext_tiny; did you mean"),
        (
            "vit_small_patch14_dinov2",
            {},
            128,
            "patches of 14 pixels, which do not divide data.image_size 128; an image",
        ),
        ("vit_small_patch14_dinov2", {}, 128, "size of 126 or 140 would do"),
        ("tiny_siglip", {"head": "ifa"}, 32, "model.head: ifa needs the .CLS. token .* and tiny_siglip has none"),
        ("tiny_swin", {"head": "ifa"}, 32, "tiny_swin has none; use cls"),
        ("tiny_dinov3", {"text_tokens": 4}, 32, "model.text_tokens: tiny_dinov3 takes no text"),
        ("tiny_mobilenetv4", {"checkpoint_blocks": True}, 64, "model.checkpoint_blocks: tiny_mobilenetv4 would count"),
        ("tiny_convnext", {"freeze": "99"}, 64, "model.freeze is '99'; use none, backbone or a number of layers from"),
        ("tiny_convnext", {"dropout": 0.1}, 64, "model.dropout: timm's tiny_convnext has none; use 0"),
        ("hiera_tiny_224", {}, 100, "data.image_size: hiera_tiny_224 does not take images of 100 pixels"),
    ],
)
def test_what_a_model_cannot_is_refused_in_one_line(
    backbone: str, settings: dict[str, object], image_size: int, line: str
) -> None:
    with pytest.raises(UseError, match=line) as caught:
        build_model(ModelConfig(backbone=backbone, **settings), image_size, CLASSES, vocab_size=9)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
