"""The gradient exchange: exact means on real ranks, sent while the backward pass runs, the same at every repetition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.config import ModelConfig
from dist_train.models.build import build_model
from dist_train.train.engine import init_process_group
from dist_train.train.exchange import GradientExchange, forward_order
from tests.train.exchange_worker import Net, exchange_on_ranks, make_net, own_gradients

STEPS = 3
SMALL, LARGE = 0.0005, 25.0  # of a bucket: each holds a parameter or two; one for each type
REACHES = ("always", "not_on_rank_1", "first_micro_batch")


def gradients(accumulation: int, reach: str, bucket_mb: float, compiled: bool = False) -> dict[str, Any]:
    case = {"kind": "gradients", "accumulation": accumulation, "reach": reach, "bucket_mb": bucket_mb}
    return case | {"compiled": compiled, "steps": STEPS}


def training(stop_after: int | None) -> dict[str, Any]:
    return {"kind": "training", "steps": 6, "stop_after": stop_after, "bucket_mb": LARGE}


CASES = {
    **{
        f"{accumulation}-{reach}-{bucket_mb}": gradients(accumulation, reach, bucket_mb)
        for accumulation in (1, 3)
        for reach in REACHES
        for bucket_mb in (SMALL, LARGE)
    },
    "compiled": gradients(3, "always", SMALL, compiled=True),
    "early": {"kind": "early", "bucket_mb": SMALL},
    "trained": training(None),
    "trained again": training(None),
    "stopped": training(2),
}
MEANS = [name for name, case in CASES.items() if case["kind"] == "gradients"]


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found in each case, on two ranks and on three."""
    return exchange_on_ranks(CASES, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", MEANS)
def test_gradients_are_the_mean_of_the_ranks_own(found: list[dict[str, Any]], name: str) -> None:
    case, net, world_size = CASES[name], make_net(), len(found)
    for step in range(STEPS):
        own = [own_gradients(case, net, step, rank) for rank in range(world_size)]
        for key, parameter in net.named_parameters():
            got = [rank[name][step].get(key) for rank in found]
            if not parameter.requires_grad:
                assert got == [None] * world_size, key
                continue
            assert all(torch.equal(other, got[0]) for other in got[1:]), key  # one model on all ranks
            assert got[0].dtype == parameter.dtype and got[0].shape == parameter.shape
            sums = [gradient[key] for gradient in own if gradient[key] is not None]
            mean = torch.stack(sums).sum(0) / world_size if sums else torch.zeros_like(parameter, dtype=torch.float64)
            rounding = 2e-2 if parameter.dtype == torch.bfloat16 else 2e-6
            largest = max((gradient.abs().max() for gradient in sums), default=0.0)
            assert (got[0].double() - mean).abs().max() <= rounding * largest, (key, step)


def test_the_cases_reach_what_they_are_about() -> None:
    net = make_net()
    assert own_gradients(CASES[f"1-not_on_rank_1-{SMALL}"], net, 0, 1)["often.weight"] is None
    assert own_gradients(CASES[f"1-not_on_rank_1-{SMALL}"], net, 0, 0)["often.weight"] is not None
    assert own_gradients(CASES[f"3-first_micro_batch-{SMALL}"], net, 0, 0)["often.weight"].abs().max() > 0
    assert own_gradients(CASES[f"3-always-{SMALL}"], net, 0, 0)["never.weight"] is None


def test_early_buckets_are_sent_and_arrive_before_the_backward_pass_ends(found: list[dict[str, Any]]) -> None:
    for rank in found:
        seen = rank["early"]
        assert 2 <= seen["started"] < seen["at_the_end_of_backward"] <= seen["in_all"]
        # The first bucket begins with the last bias; what had arrived is what the step ends with, on every rank.
        assert torch.equal(seen["arrived"][:3], seen["last_layers"])
        assert torch.equal(seen["arrived"], found[0]["early"]["arrived"])


def test_a_training_repeated_or_stopped_and_resumed_ends_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    start = [parameter.detach() for parameter in make_net().parameters()]
    for rank in found:
        assert any(not torch.equal(a, b) for a, b in zip(rank["trained"], start, strict=False))
        assert all(tensor.isfinite().all() for tensor in rank["trained"])
        for name in ("trained again", "stopped"):
            assert all(torch.equal(a, b) for a, b in zip(rank[name], found[0]["trained"], strict=True)), name


@pytest.fixture
def alone() -> None:
    """A process group of this process, an earlier test's or a new one."""
    init_process_group()


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(backbone="vit_tiny_patch16", head="cls"),
        ModelConfig(backbone="vit_tiny_patch16", head="ifa", text_tokens=4),
        ModelConfig(backbone="resnet18", head="cls"),
    ],
    ids=lambda config: f"{config.backbone}-{config.text_tokens}",
)
def test_gradients_arrive_in_about_the_reverse_of_the_forward_order(model: ModelConfig) -> None:
    """A parameter that is far from its place keeps those behind it from being sent."""
    net, _ = build_model(model, 32, 5, 40 if model.text_tokens else 0)
    expected = forward_order(net)[::-1]
    assert {*expected} == {*net.parameters()} and len(expected) == len(list(net.parameters()))
    place = {parameter: number for number, parameter in enumerate(expected)}
    arrived: list[int] = []
    for parameter in expected:
        parameter.register_post_accumulate_grad_hook(lambda parameter: arrived.append(place[parameter]))
    text = [torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)] if model.text_tokens else []
    net(torch.randn(2, 3, 32, 32), *text).sum().backward()
    assert max(abs(number - position) for position, number in enumerate(arrived)) < 10


def test_gradients_lie_in_the_buckets_from_the_first_micro_batch_on(alone: None) -> None:
    net = Net()
    exchange = GradientExchange(net.parameters(), 1)
    inputs = torch.randn(2, 13)
    net(inputs, True).sum().backward()
    first = net.first.weight.grad.data_ptr()
    exchange.begin()
    net(inputs, True).sum().backward()
    exchange.finish()
    assert net.first.weight.grad.data_ptr() == first
    own = {parameter.grad.untyped_storage().data_ptr() for parameter in net.parameters() if parameter.grad is not None}
    assert len(own) == 2  # a bucket for each type


def test_what_is_called_in_the_wrong_order_is_one_clear_line(alone: None) -> None:
    net = Net()
    exchange = GradientExchange(net.parameters(), 1, bucket_mb=SMALL)
    with pytest.raises(RuntimeError, match="needs begin before"):
        exchange.finish()
    exchange.begin()
    net(torch.randn(2, 13), True).sum().backward()
    with pytest.raises(RuntimeError, match="two backward passes"):
        net(torch.randn(2, 13), True).sum().backward()
