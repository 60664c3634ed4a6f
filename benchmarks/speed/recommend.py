"""Which batch a practitioner should take: the Pareto fronts, the cheapest within a tolerance, and how sure that is.

How sure: each arm's seeds are drawn again with replacement, as many as there are, each arm for itself, and the rule is
applied to the means of what was drawn (the bootstrap). The share of such draws in which an arm is recommended is summed
up over all draws there are, not over a sample of them. Costs are known as well as the median of the measured steps is:
where arms cost about the same, either may be the cheaper one, so the shares are averaged over costs drawn from that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from benchmarks.tables import Row, having

COSTS = {"train_minutes": "", "train_price": "_price", "train_wh": "_wh"}
"""What a training costs, by the key of a row; and what follows `pareto`, `recommended` and `recommended_share` in the
keys that say what is on the front against that cost, what is recommended by it, and in which share of draws."""
COST_DRAWS = 1000
UNIT = 1e-6  # of top-1; accuracies are whole numbers of it, so that sums and ties are exact


@dataclass(frozen=True)
class Arm:
    """What can be recommended: the cost of a training, and the top-1 (0 to 1) that each seed reached. cost_error: the
    standard error of the cost, as a share of it."""

    cost: float
    top1: tuple[float, ...]
    cost_error: float = 0.0


def mark(rows: Sequence[Row], tolerance: float, steps: int) -> None:
    """Say in the rows, for each cost that they have, which no other beats in both cost and accuracy, which is
    recommended, and in what share of draws it is.

    A batch made in several ways, which learns the same, is recommended in the cheapest. tolerance: points of top-1 that
    what is recommended may be below the best. steps: measured for each row's cost.
    """
    for cost, suffix in COSTS.items():
        known = having(rows, "top1", cost)
        on_front = front([(row[cost], row["top1"]) for row in known])
        for row, there in zip(known, on_front, strict=True):
            row[f"pareto{suffix}"], row[f"recommended{suffix}"] = there, False
            row.pop(f"recommended_share{suffix}", None)
        if not known:
            continue
        best = cheapest_ways(known, cost)
        arms = [Arm(row[cost], seeds_of(row), cost_error(row, steps)) for row in best]
        best[recommended(arms, tolerance)][f"recommended{suffix}"] = True
        if all(len(arm.top1) > 1 for arm in arms):
            for row, share in zip(best, shares(arms, tolerance), strict=True):
                row[f"recommended_share{suffix}"] = round(share, 4)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each (cost, accuracy) is on the Pareto front: no other costs at most as much, is at least as accurate,
    and differs."""
    return [
        not any(cost <= its_cost and top1 >= its_top1 and (cost, top1) != (its_cost, its_top1) for cost, top1 in points)
        for its_cost, its_top1 in points
    ]


def cheapest_ways(rows: Sequence[Row], cost: str) -> list[Row]:
    """One row of each arm: how a batch is computed changes what a training costs, not what it learns."""
    best: dict[tuple[object, ...], Row] = {}
    for row in rows:
        arm = tuple(row.get(key) for key in ("backbone", "head", "image_size", "batch_size"))
        if arm not in best or row[cost] < best[arm][cost]:
            best[arm] = row
    return list(best.values())


def seeds_of(row: Row) -> tuple[float, ...]:
    """The top-1 of each seed; of the one seed where the row is of a time that had no more."""
    return tuple(row.get("top1_by_seed") or [row["top1"]])


def cost_error(row: Row, steps: int) -> float:
    """Standard error of the median time of a row's steps, as a share of it: that of a normal distribution with the same
    median and 95th percentile. 0 where the row has none."""
    if not having([row], "step_ms", "step_ms_p95"):
        return 0.0
    normal = NormalDist()
    deviation = (row["step_ms_p95"] / row["step_ms"] - 1) / normal.inv_cdf(0.95)
    return deviation * math.sqrt(math.pi / 2 / steps)


def recommended(arms: Sequence[Arm], tolerance: float) -> int:
    """The place of the cheapest arm whose mean top-1 is at most `tolerance` points below the best."""
    weights, within = _scale(arms, tolerance)
    means = [weight * sum(_units(arm)) for arm, weight in zip(arms, weights, strict=True)]
    good = [i for i, mean in enumerate(means) if mean >= max(means) - within]
    return min(good, key=lambda i: arms[i].cost)


def shares(arms: Sequence[Arm], tolerance: float) -> list[float]:
    """In what share of all draws each arm is recommended; they add up to 1."""
    found = np.zeros(len(arms))
    for order, share in _orders(arms).items():
        found += share * np.array(_shares(arms, tolerance, order))
    return [float(share) for share in found]


def _orders(arms: Sequence[Arm]) -> dict[tuple[int, ...], float]:
    """In which orders, the cheapest first, the costs may stand, and in what share of their draws they do."""
    costs = np.array([arm.cost for arm in arms])
    errors = np.array([arm.cost_error for arm in arms])
    if not errors.any():
        return {tuple(np.argsort(costs, kind="stable").tolist()): 1.0}
    drawn = costs * np.exp(errors * np.random.default_rng(0).standard_normal((COST_DRAWS, len(arms))))
    counts = Counter(map(tuple, np.argsort(drawn, axis=1, kind="stable").tolist()))
    return {order: number / COST_DRAWS for order, number in counts.items()}


def _shares(arms: Sequence[Arm], tolerance: float, order: Sequence[int]) -> list[float]:
    """The same where the arms cost as much as this order says.

    Arms are drawn for themselves, so the probability that the best mean is b and that arm i is recommended is a
    product over the arms: i has a mean in [b - tolerance, b], those cheaper than i have less, no other more than b.
    """
    weights, within = _scale(arms, tolerance)
    below = [_distribution(_units(arm), weight) for arm, weight in zip(arms, weights, strict=True)]
    best = np.unique(np.concatenate([values for values, _ in below]))

    def at_most(i: int, side: str) -> np.ndarray:
        """Probability that arm i has a mean of at most (side right) or below (left) each `best`."""
        values, sums = below[i]
        return sums[np.searchsorted(values, best, side)]  # type: ignore[call-overload]

    def under_floor(i: int) -> np.ndarray:
        values, sums = below[i]
        return sums[np.searchsorted(values, best - within, "left")]

    def where(place: int, side: str) -> np.ndarray:
        """Probability that the arm at this place has what it takes, and that no mean is above (or at) `best`."""
        chosen, cheaper, dearer = order[place], order[:place], order[place + 1 :]
        found = np.clip(at_most(chosen, side) - under_floor(chosen), 0, None)
        for i in cheaper:
            found = found * under_floor(i)
        for i in dearer:
            found = found * at_most(i, side)
        return found

    found = [0.0] * len(arms)
    for place, i in enumerate(order):
        found[i] = float((where(place, "right") - where(place, "left")).sum())
    return found


def _units(arm: Arm) -> list[int]:
    return [round(top1 / UNIT) for top1 in arm.top1]


def _scale(arms: Sequence[Arm], tolerance: float) -> tuple[list[int], int]:
    """What makes sums over each arm's seeds comparable whole numbers, and the tolerance in the same measure."""
    common = math.lcm(*(len(arm.top1) for arm in arms))
    return [common // len(arm.top1) for arm in arms], round(tolerance / 100 / UNIT * common)


def _distribution(values: Sequence[int], weight: int) -> tuple[np.ndarray, np.ndarray]:
    """The sums of as many draws with replacement as there are values, in order, times `weight`; and the probability of
    less than each, with 1 at the end."""
    sums = {0: 1}
    for _ in values:
        longer: Counter[int] = Counter()
        for total, number in sums.items():
            for value in values:
                longer[total + value] += number
        sums = longer
    ordered = sorted(sums)
    numbers = [sums[total] / len(values) ** len(values) for total in ordered]
    return weight * np.array(ordered, np.int64), np.concatenate([[0.0], np.cumsum(numbers)])
