"""Whole models: every one trains, no parameter is idle, and the ways a trainer runs them agree."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config import ModelConfig
from dist_train.models.build import Classifier, build_model

CNNS = ["resnet18", "resnet50", "efficientnet_b0"]
VITS = [f"vit_{size}_patch{patch}" for size in ("tiny", "small", "base", "large") for patch in (16, 32)]
HEADS_AND_TEXT = [(head, text_tokens) for head in ("cls", "ifa") for text_tokens in (0, 16)]
SMALL = [*((cnn, "cls", 0) for cnn in CNNS), *(("vit_tiny_patch16", *both) for both in HEADS_AND_TEXT)]
EVERY = [
    *((cnn, "cls", 0, image_size) for cnn in CNNS for image_size in (64, 128)),
    *((vit, *both, image_size) for vit in VITS for both in HEADS_AND_TEXT for image_size in (64, 128)),
]


def batch(image_size: int, text_tokens: int, size: int = 2) -> tuple[Tensor, ...]:
    images = torch.randn(size, 3, image_size, image_size)
    if text_tokens == 0:
        return (images,)
    mask = torch.arange(text_tokens).expand(size, -1) < text_tokens - 3
    return images, torch.randint(1, 100, (size, text_tokens)), mask


def build(backbone: str, head: str, text_tokens: int, image_size: int, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    config = ModelConfig(backbone, head, "default", text_tokens, **settings)  # type: ignore[arg-type]
    return build_model(config, image_size, num_classes=11, vocab_size=100)[0]


def build_quickly(backbone: str, head: str, text_tokens: int, image_size: int) -> Classifier:
    """As `build`, but large models with uniform noise for weights, which takes a tenth of the time."""
    if not backbone.startswith(("vit_base", "vit_large")):
        return build(backbone, head, text_tokens, image_size)
    with torch.device("meta"):
        model = build(backbone, head, text_tokens, image_size)
    model.to_empty(device="cpu")
    noise = torch.empty(2**20).uniform_(-0.05, 0.05)
    for parameter in model.parameters():
        for part in parameter.data.flatten().split(len(noise)):
            part.copy_(noise[: len(part)])
    return model


@pytest.mark.parametrize(
    ("backbone", "head", "text_tokens", "image_size"),
    EVERY,
)
def test_every_model_makes_a_training_step_and_an_evaluation_pass(
    backbone: str, head: str, text_tokens: int, image_size: int
) -> None:
    model = build_quickly(backbone, head, text_tokens, image_size)
    inputs = batch(image_size, text_tokens, size=2 if backbone in CNNS else 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {name: parameter.flatten()[:8].clone() for name, parameter in model.named_parameters()}
    logits = model(*inputs)
    assert logits.shape == (len(inputs[0]), 11)
    nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
    optimizer.step()
    assert any(
        not torch.equal(before[name], p.flatten()[:8]) for name, p in model.backbone.named_parameters("backbone")
    )
    with torch.no_grad():
        after = model.eval()(*inputs)
    assert after.shape == logits.shape and after.isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "head", "text_tokens", "mask_padding"),
    [*((*small, True) for small in SMALL), *((*small, False) for small in SMALL if small[2] > 0)],
)
def test_gradients_reach_every_parameter(backbone: str, head: str, text_tokens: int, mask_padding: bool) -> None:
    model = build(backbone, head, text_tokens, image_size=64, mask_padding=mask_padding)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm starts the last one of a residual block at zero, which holds back
    model(*batch(64, text_tokens, size=4)).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def test_activation_checkpointing_and_compiled_blocks_change_no_gradient() -> None:
    model = build("vit_tiny_patch16", "ifa", text_tokens=16, image_size=32)
    inputs = batch(32, 16)
    expected = gradients(model, inputs)

    model.backbone.set_grad_checkpointing(True)
    checkpointed = gradients(model, inputs)
    model.backbone.set_grad_checkpointing(False)
    for block in model.backbone.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    compiled = gradients(model, inputs)
    for name, gradient in expected.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
        torch.testing.assert_close(compiled[name], gradient, msg=name)


@pytest.mark.parametrize("head", ["cls", "ifa"])
def test_backbone_and_head_are_compiled_whole_in_bf16_too(head: str) -> None:
    """Without a break of the graph; to what the operators themselves give."""
    model = build("vit_tiny_patch16", head, text_tokens=16, image_size=32)
    model.autocast = model.backbone.token_dtype = torch.bfloat16
    inputs = batch(32, 16)
    expected = gradients(model, inputs)
    for part in (model.backbone, model.text, model.head):
        part.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=0.1, atol=0.05 * float(expected[name].abs().max()), msg=name
        )


def test_a_model_that_is_asked_to_checkpoints_its_blocks_alone() -> None:
    assert build("vit_tiny_patch16", "ifa", 0, 32, checkpoint_blocks=True).backbone.grad_checkpointing
    assert not build("vit_tiny_patch16", "ifa", 0, 32).backbone.grad_checkpointing


@pytest.mark.parametrize("mask_padding", [True, False])
def test_attention_of_every_block_is_fused_with_and_without_a_padding_mask(mask_padding: bool) -> None:
    model = build("vit_tiny_patch16", "cls", text_tokens=16, image_size=32, mask_padding=mask_padding)
    with torch.profiler.profile() as profile:
        model(*batch(32, 16)).sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::scaled_dot_product_attention"] == 12
    assert not {"aten::softmax", "aten::_scaled_dot_product_attention_math"} & calls.keys()


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet_b0", "vit_tiny_patch16"])
def test_drop_path_rises_linearly_over_the_blocks_and_acts_in_training_alone(backbone: str) -> None:
    model, plain = (build(backbone, "cls", 0, 64, drop_path=rate) for rate in (0.3, 0.0))
    rates = [module.drop_prob for name, module in model.named_modules() if type(module).__name__ == "DropPath"]
    if backbone.startswith("vit"):  # attention and MLP; the first block has none
        assert rates == pytest.approx([0.3 * block / 11 for block in range(1, 12) for _ in range(2)])
    assert rates and rates == sorted(rates) and 0 < rates[0] < rates[-1] <= 0.3 + 1e-6
    for parameter in model.parameters():  # a ResNet's branches start at zero: to drop one would not show
        nn.init.normal_(parameter, std=0.1)
    plain.load_state_dict(model.state_dict())
    inputs = batch(64, 0, size=4)
    torch.testing.assert_close(model.eval()(*inputs), plain.eval()(*inputs))
    assert not torch.allclose(model.train()(*inputs), plain.train()(*inputs), rtol=1e-3)


def test_activation_checkpointing_saves_memory() -> None:
    def saved_bytes(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(4, 3, 64, 64))
        return sum(sizes.values())

    model = build("vit_tiny_patch8", "ifa", 0, image_size=64)
    plain = saved_bytes(model)
    model.backbone.set_grad_checkpointing(True)
    assert saved_bytes(model) < plain / 2


@pytest.mark.parametrize(("backbone", "head", "text_tokens"), [SMALL[0], *SMALL[3:]])
def test_bfloat16_autocast_stays_near_float32(backbone: str, head: str, text_tokens: int) -> None:
    model = build(backbone, head, text_tokens, image_size=64)
    inputs = batch(64, text_tokens, size=4)
    model(*inputs)  # sets the running statistics of batch norms
    expected = model.eval()(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*inputs)
    logits.float().square().sum().backward()
    assert (logits.float() - expected).norm() / expected.norm() < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())  # type: ignore[union-attr]
