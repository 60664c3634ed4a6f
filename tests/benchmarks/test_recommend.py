"""Which batch is recommended by each cost, the fronts, and how sure that is: against all draws, one by one."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speed.recommend import Arm, cost_error, front, mark, recommended, shares


def by_enumeration(arms: list[tuple[float, list[int]]], tolerance: Fraction) -> list[Fraction]:
    """The share of all draws with replacement in which each (cost, percent by seed) is the cheapest within the
    tolerance of the best mean; of equally cheap ones the first."""
    counts: Counter[int] = Counter()
    below = 6 * tolerance  # means of up to three, in sixths, are whole numbers
    sixths = [[6 * sum(drawn) // len(drawn) for drawn in product(seeds, repeat=len(seeds))] for _, seeds in arms]
    in_order = sorted(range(len(arms)), key=lambda i: (arms[i][0], i))
    for means in product(*sixths):
        least = max(means) - below
        counts[next(i for i in in_order if means[i] >= least)] += 1
    return [Fraction(counts[i], counts.total()) for i in range(len(arms))]


def test_two_batches_of_three_seeds_as_counted_by_hand() -> None:
    """The dear one has 80 %; the cheap one 78, 79 and 80 %, whose mean of three draws is at least 79 % in 17 of 27."""
    arms = [Arm(2.0, (0.80, 0.80, 0.80)), Arm(1.0, (0.78, 0.79, 0.80))]
    assert shares(arms, 1.0) == pytest.approx([10 / 27, 17 / 27])
    assert by_enumeration([(2.0, [80, 80, 80]), (1.0, [78, 79, 80])], Fraction(1)) == [
        Fraction(10, 27),
        Fraction(17, 27),
    ]
    assert recommended(arms, 1.0) == 1 and recommended(arms, 0.5) == 0


def test_of_two_that_learn_the_same_the_cheaper_one_is_as_sure_as_the_costs_are() -> None:
    same = (0.8, 0.8)
    assert shares([Arm(1.0, same), Arm(1.1, same)], 1.0) == [1.0, 0.0]
    found = shares([Arm(1.0, same, 0.06), Arm(1.1, same, 0.08)], 1.0)
    likely = NormalDist(0, math.hypot(0.06, 0.08)).cdf(math.log(1.1))  # that the first one is the cheaper
    assert found == pytest.approx([likely, 1 - likely], abs=0.04) and 0.75 < likely < 0.9
    # What is not good enough is not taken for being cheap.
    assert shares([Arm(1.0, same, 0.1), Arm(1.0, (0.7, 0.7), 0.1)], 1.0) == [1.0, 0.0]


def test_the_error_of_a_median_is_that_of_medians_of_such_steps() -> None:
    times = np.random.default_rng(1).normal(100.0, 8.0, (4000, 25))
    error = cost_error({"step_ms": 100.0, "step_ms_p95": 100 + 8 * NormalDist().inv_cdf(0.95)}, 25)
    assert 100 * error == pytest.approx(float(np.median(times, axis=1).std()), rel=0.05)
    assert cost_error({"step_ms": 100.0}, 25) == 0.0


ARM = st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.lists(st.integers(70, 76), min_size=1, max_size=3))


@settings(max_examples=40)
@given(st.lists(ARM, min_size=2, max_size=3), st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1), Fraction(2)]))
def test_the_shares_are_those_of_all_draws(arms: list[tuple[float, list[int]]], tolerance: Fraction) -> None:
    exact = [Arm(cost, tuple(percent / 100 for percent in seeds)) for cost, seeds in arms]
    found = shares(exact, float(tolerance))
    assert found == pytest.approx([float(share) for share in by_enumeration(arms, tolerance)], abs=1e-12)
    assert sum(found) == pytest.approx(1)
    means = [Fraction(sum(seeds), len(seeds)) for _, seeds in arms]
    good = [i for i, mean in enumerate(means) if mean >= max(means) - tolerance]
    assert recommended(exact, float(tolerance)) == min(good, key=lambda i: arms[i][0])


def test_many_batches_and_seeds_are_no_more_than_a_moment() -> None:
    arms = [Arm(n, tuple((1600 + (37 * n + 11 * seed**2) % 60) / 2000 for seed in range(8))) for n in range(10)]
    assert sum(shares(arms, 1.0)) == pytest.approx(1)


POINTS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)


@given(POINTS)
def test_on_the_front_is_what_no_point_beats(points: list[tuple[int, int]]) -> None:
    def is_beaten(cost: int, top1: int) -> bool:
        as_cheap = [t for c, t in points if c <= cost]
        cheaper = [t for c, t in points if c < cost]
        return max(as_cheap) > top1 or max(cheaper, default=0) >= top1

    assert front(points) == [not is_beaten(*point) for point in points]


def row(batch: int, top1: list[float], minutes: float, **more: Any) -> dict[str, Any]:
    return {
        **{"backbone": "vit_tiny_patch16", "head": "cls", "image_size": 64, "batch_size": batch},
        **{"top1": sum(top1) / len(top1), "top1_by_seed": top1, "train_minutes": minutes},
    } | more


def test_each_cost_has_its_own_front_and_choice() -> None:
    rows = [
        row(16, [0.80, 0.82], 9.0, train_wh=3.0),
        row(64, [0.80, 0.81], 5.0, train_wh=6.0),
        row(256, [0.60, 0.62], 4.0, train_wh=2.0),
        {"batch_size": 512, "out_of_memory": True},
    ]
    mark(rows, 1.0, 10)
    assert [r.get("pareto") for r in rows] == [True, True, True, None]
    assert [r.get("pareto_wh") for r in rows] == [True, False, True, None]
    assert [r.get("recommended") for r in rows] == [False, True, False, None]
    assert [r.get("recommended_wh") for r in rows] == [True, False, False, None]
    assert not any("pareto_price" in r for r in rows)
    # 64 falls short where the other's draws are 82, 82 %, a quarter, and its own not 81, 81 %, three quarters.
    assert [r.get("recommended_share") for r in rows] == [0.1875, 0.8125, 0.0, None]


def test_one_seed_has_no_share_and_a_batch_made_in_two_ways_is_one() -> None:
    rows = [row(16, [0.8, 0.8], 2.0, micro_batch=16), row(16, [0.8, 0.8], 1.0, micro_batch=4), row(32, [0.7], 0.5)]
    mark(rows, 1.0, 10)
    assert not any("recommended_share" in r for r in rows)
    rows[2] |= {"top1_by_seed": [0.7, 0.7]}
    mark(rows, 1.0, 10)
    assert [r.get("recommended_share") for r in rows] == [None, 1.0, 0.0]
    assert [r["recommended"] for r in rows] == [False, True, False]
    rows[2] |= {"top1_by_seed": None}  # a result of a time that had one seed
    mark(rows, 1.0, 10)
    assert not any("recommended_share" in r for r in rows)
