"""The learning rate as the paper states it, at the steps where it can be told by hand."""

from __future__ import annotations

import math

import pytest

from dist_train.config import OptimConfig, Schedule
from dist_train.errors import UseError
from dist_train.train.schedule import check_schedule, learning_rate


def test_constant_epoch_divides_by_3_after_every_20_epochs() -> None:
    config = OptimConfig(lr=0.001, schedule="constant_epoch")
    rates = [learning_rate(config, 64, epoch * 10, 500, 640) for epoch in (0, 19, 20, 39, 40, 49)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3 / 3, 1e-3 / 3, 1e-3 / 9, 1e-3 / 9], rel=1e-12)
    assert learning_rate(config, 64, 199, 500, 640) == 1e-3  # the last step of epoch 20


def test_cosine_warms_up_linearly_from_0_and_ends_at_0() -> None:
    config = OptimConfig(lr=0.001, schedule="cosine", warmup_steps=1000)
    rates = [learning_rate(config, 64, step, 5001, 640) for step in range(5001)]
    assert rates[0] == 0 and rates[500] == pytest.approx(5e-4) and rates[1000] == 1e-3
    assert rates[3000] == pytest.approx(5e-4) and rates[2000] == pytest.approx(1e-3 * (0.5 + math.sqrt(0.125)))
    assert rates[5000] == pytest.approx(0, abs=1e-18)
    assert max(rates) == 1e-3


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_batch_size_rules_scale_the_rate(rule: str, factor: float) -> None:
    config = OptimConfig(lr=0.001, schedule="constant", lr_scaling=rule, lr_reference_batch=64)
    assert learning_rate(config, 256, 7, 100, 640) == pytest.approx(0.001 * factor)


@pytest.mark.parametrize("schedule", ["constant", "constant_epoch", "cosine"])
def test_a_warm_up_as_long_as_the_run_is_refused(schedule: Schedule) -> None:
    with pytest.raises(UseError, match=r"warmup_steps 90 leaves nothing of the run's 90 steps"):
        check_schedule(OptimConfig(schedule=schedule, warmup_steps=90), 90)
    check_schedule(OptimConfig(schedule=schedule, warmup_steps=89), 90)
