"""What a head costs on paper, held to what torch counts and to what the operators make."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.speed import ifa, ifa_point
from benchmarks.speed.head_cost import (
    TRAINING,
    Size,
    head_cost,
    products_of,
    share_of_step,
    step_flops,
    weights_of,
)
from dist_train.config import ModelConfig
from dist_train.models.build import build_model
from dist_train.models.heads import HEADS
from dist_train.train.meters import training_flops_per_sample
from dist_train.train.precision import measured_products

SMALL = Size(batch=3, patches=16, dim=192, depth=12, classes=11, patch=16)
SHAPES = {"pooled": (3, 192), "cls": (3, 192, 12), "cls_and_average": (3, 384, 12)}


@pytest.mark.parametrize("name", HEADS)
def test_the_products_of_a_head_are_those_that_torch_counts(name: str) -> None:
    head = HEADS[name](SMALL.dim, SMALL.depth, SMALL.classes, 1e-6)
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(SHAPES[head.reads]))
    assert counter.get_total_flops() == SMALL.batch * products_of(name, SMALL)
    assert sum(p.numel() for key, p in head.named_parameters() if p.ndim > 1) == weights_of(name, SMALL)


def test_the_products_of_a_step_are_those_that_torch_counts() -> None:
    model, _ = build_model(ModelConfig(backbone="vit_tiny_patch16"), 64, SMALL.classes)
    counted = training_flops_per_sample(model, torch.randn(1, 3, 64, 64))
    assert SMALL.batch * counted == step_flops(SMALL)
    model, _ = build_model(ModelConfig(backbone="vit_tiny_patch16", text_tokens=8), 64, SMALL.classes, 50)
    text = torch.ones(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.bool)
    counted = training_flops_per_sample(model, torch.randn(1, 3, 64, 64), *text)
    assert SMALL.batch * counted == step_flops(replace(SMALL, text=8))


def test_text_makes_a_step_longer_and_a_head_no_larger() -> None:
    point = {"backbone": "vit_base_patch16", "size": 128, "batch": 16, "classes": 1000}
    alone, beside = (ifa.counted(point | {"text_tokens": text}, "ifa")["counted_percent_eager"] for text in (0, 32))
    assert 0 < beside < alone
    assert head_cost("attentive", Size(text=32)) == head_cost("attentive", Size())  # the average is of the patches
    assert head_cost("stacked", Size(text=32)).bytes > head_cost("stacked", Size()).bytes


def test_a_head_adds_at_most_a_hundredth_to_a_step_of_vit_b_16_but_for_many_classes() -> None:
    for patches in (64, 196):  # 128 and 224 px
        for name in ("mean", "ifa", "last_n", "attentive"):
            assert 0 < share_of_step(name, Size(patches=patches), "compiled") < 0.01
            assert share_of_step(name, Size(patches=patches), "eager") < 0.012
    # The classifier of all_layers has 24 times the weights of that of CLS: few classes are cheap, many are not.
    assert share_of_step("all_layers", Size(classes=100), "compiled") < 0.01
    assert 0.01 < share_of_step("all_layers", Size(classes=1000), "compiled") < 0.02
    assert share_of_step("all_layers", Size(classes=3263), "compiled") > 0.04
    assert share_of_step("stacked", Size()) > 20 * share_of_step("ifa", Size())


def test_the_counted_cost_grows_with_images_and_tokens_where_it_should() -> None:
    for name in HEADS:
        assert head_cost(name, Size(batch=512)).flops == 2 * head_cost(name, Size()).flops
    averages = head_cost("attentive", Size(), "eager").bytes - head_cost("attentive", Size(), "compiled").bytes
    assert averages == 2 * 2 * 256 * 64 * 768 * 12  # two passes over all tokens of all blocks, of two bytes
    assert head_cost("ifa", Size(patches=196)) == head_cost("ifa", Size(patches=64))
    assert head_cost("cls", Size()).flops == TRAINING * 256 * 2 * 768 * 1000


def test_heads_that_cannot_be_compared_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ifa", "--name", "x", "--heads", "cls,nonesuch"]) == 2
    assert (
        "no head 'nonesuch'; there are cls, mean, ifa, last_n, all_layers, attentive, stacked" in capfd.readouterr().err
    )
    assert main(["ifa", "--name", "x", "--heads", "ifa"]) == 2
    assert "the others are compared with cls; use cls,ifa" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["all_layers", "attentive", "last_n", "mean"])
def test_a_contestant_computes_its_head_in_the_precision_that_is_asked_for(name: str) -> None:
    device = torch.device("cpu")
    point = {"backbone": "vit_tiny_patch16", "text_tokens": 0, "batch": 2, "size": 32, "classes": 5}
    exact = ifa_point.make_model(point, name, device).eval()
    assert exact.head.__class__ is HEADS[name]
    for precision in ("bf16", "bf16_autocast"):
        model = ifa_point.make_model(point | {"precision": precision}, name, device)
        with measured_products() as products:
            logits = model(*ifa_point.inputs(point, device))
            logits.float().square().sum().backward()
        assert products.shares() == {"bf16": 1.0}
        assert 0 < (logits.float() - exact(*ifa_point.inputs(point, device))).abs().max() < 0.1
