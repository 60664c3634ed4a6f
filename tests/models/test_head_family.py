"""The heads beside CLS and IFA: each one's formula, start and plain names, and what their averages cost."""

import copy
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.config import Head, ModelConfig
from dist_train.errors import UseError
from dist_train.models.build import Classifier, build_model, plain_weights, to_timm_state_dict
from dist_train.models.cls_token import take_cls_and_average
from dist_train.models.heads import HEADS, initialise_head
from tests.harness import train
from tests.models.test_heads import DEPTH, DIM, TokenSized, build, every_blocks_output, inputs

NEW = ("mean", "last_n", "all_layers", "attentive")
CLASSES, EPS = 7, 1e-6


def head_of(name: str, dim: int, depth: int) -> Any:
    torch.manual_seed(0)
    head = HEADS[name](dim, depth, CLASSES, EPS).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


# ------------------------------------------------------------------ the definitions, sample by sample, in float64
def norm(token: Tensor, layer: nn.LayerNorm) -> Tensor:
    centred = token - token.sum() / len(token)
    return centred / ((centred**2).sum() / len(token) + EPS).sqrt() * layer.weight + layer.bias


def linear(token: Tensor, layer: nn.Linear) -> Tensor:
    return torch.stack([(row * token).sum() for row in layer.weight]) + layer.bias


def as_defined(name: str, head: Any, cls: list[Tensor], averages: list[Tensor]) -> Tensor:
    """Logits of one sample whose blocks give these [CLS] and averages, (D,) each, in the words of the docstrings."""
    if name == "mean":
        return linear(norm(sum(cls[1:], cls[0]) / len(cls), head.norm), head.classifier)
    if name == "last_n":
        return linear(torch.cat([norm(token, head.norm) for token in cls[-4:]]), head.classifier)
    both = [token for pair in zip(cls, averages, strict=True) for token in pair]
    if name == "all_layers":
        return linear(torch.cat([norm(token, head.norm) for token in both]), head.classifier)
    tokens = [norm(token, head.norm_tokens) for token in both]
    values = []
    for scores, matrix in zip(head.score.weight, head.value.weight, strict=True):
        weights = [math.exp((scores * token).sum().item()) for token in tokens]
        # Multi-head attention as it is usually written: each token's value, and then their average.
        values.append(sum(w / sum(weights) * (token @ matrix) for w, token in zip(weights, tokens, strict=True)))
    return linear(norm(linear(torch.cat(values), head.project), head.norm), head.classifier)


@pytest.mark.parametrize("depth", [3, 6])
@pytest.mark.parametrize("name", NEW)
def test_a_head_is_its_formula(name: str, depth: int) -> None:
    dim = 128 if name == "attentive" else 24
    head = head_of(name, dim, depth)
    if name == "attentive":
        assert head.score.weight.shape == (2, dim)  # attention heads of 64 channels
    cls, averages = torch.randn(2, 4, dim, depth, dtype=torch.float64) * 3
    features = cls if HEADS[name].reads == "cls" else torch.cat([cls, averages], dim=1)
    expected = [as_defined(name, head, list(cls[i].T), list(averages[i].T)) for i in range(4)]
    torch.testing.assert_close(head(features), torch.stack(expected), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("text_tokens", [0, 6])
@pytest.mark.parametrize("name", NEW)
def test_a_model_gives_its_head_every_blocks_tokens_without_text(name: str, text_tokens: int) -> None:
    torch.manual_seed(0)
    model = build(name, text_tokens, patch=16).eval()
    with torch.no_grad():
        stacked, logits = every_blocks_output(model, *inputs(model, batch=2))
        assert stacked.shape == (2, 1 + 16 + text_tokens, DIM, DEPTH)
        cls, averages = stacked[:, 0], stacked[:, 1:17].mean(dim=1)
        features = cls if HEADS[name].reads == "cls" else torch.cat([cls, averages], dim=1)
        torch.testing.assert_close(logits, model.head(features), atol=1e-5, rtol=1e-5)


def test_every_head_that_a_recipe_can_name_is_there() -> None:
    assert tuple(HEADS) == get_args(Head)


# ------------------------------------------------------------------ the start
@pytest.mark.parametrize("name", NEW)
def test_a_classifier_starts_as_head_init_says(name: str) -> None:
    for head_init, zero in (("reference", False), ("default", False), ("mean", False), ("last", False), ("zero", True)):
        torch.manual_seed(0)
        head: Any = HEADS[name](64, 4, CLASSES, EPS)
        drawn = copy.deepcopy(head.state_dict())
        initialise_head(head, head_init)  # type: ignore[arg-type]
        changed = {key for key, value in head.state_dict().items() if not torch.equal(value, drawn[key])}
        started = {"classifier.weight", "classifier.bias"} if zero else set()
        started |= {"score.weight"} if head_init == "mean" and name == "attentive" else set()
        assert changed == started
        assert all((head.state_dict()[key] == 0).all() for key in changed)


def test_attention_that_starts_at_the_mean_weighs_all_tokens_alike() -> None:
    head = head_of("attentive", 128, 4)
    initialise_head(head, "mean")
    seen: list[Tensor] = []
    head.value.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features = torch.randn(3, 256, 4, dtype=torch.float64)
    head(features)
    tokens = torch.stack([norm(t, head.norm_tokens) for t in features.transpose(1, 2).reshape(24, 128)]).view(3, 8, 128)
    torch.testing.assert_close(seen[0], tokens.mean(dim=1, keepdim=True).expand(3, 2, 128))


# ------------------------------------------------------------------ averages between the blocks
def test_the_gradient_of_cls_and_average_is_the_plain_forms() -> None:
    def plain(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, torch.cat([tokens[:, 0], tokens[:, 2:6].mean(dim=1)], dim=1)

    def ours(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return take_cls_and_average(tokens, 2, 4)

    def used(take: Any, uses_tokens: bool, tokens: Tensor) -> Tensor:
        tokens = tokens * 1.5  # a tensor that autograd made, as a block's output
        tokens, taken = take(tokens)
        return taken.sin().sum() + (tokens.cos() * tokens.sigmoid()).sum() * uses_tokens

    torch.manual_seed(0)
    tokens = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    for uses_tokens in (True, False):  # nothing but the head reads the last block's
        (expected,) = torch.autograd.grad(used(plain, uses_tokens, tokens), tokens)
        (found,) = torch.autograd.grad(used(ours, uses_tokens, tokens), tokens)
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
        assert torch.autograd.gradcheck(lambda t, used_too=uses_tokens: used(ours, used_too, t), tokens)


@pytest.mark.parametrize("settings", [{}, {"drop_path": 0.3}, {"checkpoint_blocks": True}, {"freeze": "3"}])
@pytest.mark.parametrize("text_tokens", [0, 6])
def test_gradients_are_those_of_tokens_that_are_stacked_first(settings: dict[str, Any], text_tokens: int) -> None:
    torch.manual_seed(0)
    model = build("attentive", text_tokens, 16, head_init="default", **settings).double()
    images, *text = inputs(model, batch=2)
    batch = (images.double().requires_grad_(), *text)

    def gradients(logits: Tensor) -> list[Tensor]:
        wanted = [batch[0], *filter(lambda p: p.requires_grad, model.parameters())]
        return list(torch.autograd.grad(logits.square().sum(), wanted))

    torch.manual_seed(1)  # for drop path
    stacked, _ = every_blocks_output(model, *batch)
    expected = gradients(model.head(torch.cat([stacked[:, 0], stacked[:, 1:17].mean(dim=1)], dim=1)))
    torch.manual_seed(1)
    for found, exact in zip(gradients(model(*batch)), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_an_average_makes_no_tensor_of_all_tokens() -> None:
    """A backward pass makes as many of that size as one of CLS; the plain form makes four a block more."""
    made = {}
    for name in ("cls", "all_layers", "attentive"):
        torch.manual_seed(0)
        model = build(name, head_init="default")
        loss = model(*inputs(model, batch=4)).square().sum()
        with TokenSized(4 * 64 * DIM) as watch:  # more than the weights of any head
            loss.backward()
        made[name] = watch.made
    assert made["all_layers"] == made["attentive"] == made["cls"] > DEPTH - 3


# ------------------------------------------------------------------ names
@pytest.mark.parametrize("name", NEW)
def test_plain_names_begin_with_the_heads(name: str) -> None:
    model = build(name, patch=32)
    backbone, own = to_timm_state_dict(model)
    assert {key.split(".")[0] for key in own} == {name}
    assert f"{name}.classifier.weight" in own
    reference = timm.create_model("vit_tiny_patch16_224", patch_size=32, img_size=64, num_classes=0)
    missing, unexpected = reference.load_state_dict(backbone, strict=False)
    assert (set(missing), unexpected) == ({"norm.weight", "norm.bias"}, [])


def load(source: Path, head: str, class_names: tuple[str, ...] = ()) -> tuple[Classifier, Any]:
    config = ModelConfig(backbone="vit_tiny_patch8", head=head, weights=str(source))  # type: ignore[arg-type]
    return build_model(config, 16, 4, class_names=class_names)


@pytest.mark.parametrize("name", NEW)
def test_a_run_starts_from_another_with_its_head_or_without(
    name: str, tmp_path: Path, shard_set: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shards, run = shard_set({"train": [24]}, size=(20, 20)), tmp_path / "run"
    assert train(shards, run, model__head=name, model__head_init="mean", train__epochs=1) == 0, capfd.readouterr().err
    model, report = load(run, name)
    assert report.new == [] and report.unused == []
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    for other in ("cls", "ifa", NEW[NEW.index(name) - 1]):
        _, report = load(run, other)
        assert {key.split(".")[0] for key in report.unused} == {name}
        assert ("head.weight" if other == "cls" else f"{other}.classifier.weight") in report.new
    # Its tensors in a file of their own: nothing says which head they are of.
    weights = {f"backbone.{key}": value for key, value in model.backbone.state_dict().items()}
    weights |= {f"head.{key}": value for key, value in model.head.state_dict().items()}
    save_file(weights, tmp_path / "alone.safetensors")
    with pytest.raises(UseError, match="which head it has; give the folder of its checkpoint"):
        load(tmp_path / "alone.safetensors", name)
    assert json.loads((folder / "state.json").read_text())["recipe"]["model"]["head"] == name
    assert set(plain_weights(model)) >= {f"{name}.classifier.weight"}
