"""What the runs of the study answer: each question with a verdict by a rule fixed beforehand, and the figures.

Runs are compared seed by seed: the two runs of a pair have the same seed, so the same order, augmentation and starting
weights. A difference counts if its mean over the seeds is further from 0 than the one-sided 95 % quantile of Student's
t times its standard error; otherwise the question is undecided. With few seeds that is a hard rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# One-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom (any table of the distribution).
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
CONFIRMED, REFUTED, UNDECIDED = "confirmed", "not confirmed", "undecided"
CLOSED = 0.9
"""Share of a gap from which it counts as closed."""
BASE = {
    "backbone": "vit_tiny_patch32",
    "image_size": 64,
    "text_tokens": 0,
    "head_init": "reference",
    "lr_scaling": "none",
    "budget": "epochs",
}
"""What a run is where a comparison does not say otherwise."""


@dataclass(frozen=True)
class Estimate:
    """Mean of one number per seed, with its standard error (NaN for one seed)."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        if len(self.values) < 2:
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def sign(self) -> int:
        """1 or -1 where the mean is above or below 0 by the rule of this module, else 0."""
        if len(self.values) < 2:
            return 0
        reach = T_95[min(len(self.values) - 1, len(T_95)) - 1] * self.error
        return 1 if self.mean > reach else -1 if self.mean < -reach else 0

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:.1f}"
        return f"{self.mean:+.1f}{error}"


def answer_questions(rows: Sequence[Row], surfaces: Sequence[Row] = ()) -> list[dict[str, str]]:
    """Question, verdict and evidence, as far as the rows go. surfaces: rows of `benchmarks landscape` of such runs."""
    answers = []
    for question in (
        _falls_with_the_batch,
        _ifa_helps,
        _gain_grows,
        _rate_scaling,
        _ifa_beside_rate_scaling,
        _equal_steps,
        _ifa_beside_equal_steps,
        _initialisation,
        _text,
        _patches,
        _image_size,
    ):
        answers += list(question(rows))
    return answers + list(_smoother(surfaces))


def accuracies(rows: Sequence[Row], **conditions: Any) -> dict[int, float]:
    """Test top-1 in percent by seed, of the runs that meet the conditions and are BASE in everything else."""
    wanted = BASE | conditions
    return {
        row["seed"]: 100 * row["top1"] for row in rows if all(row.get(key) == value for key, value in wanted.items())
    }


def mean_of(values: dict[int, float]) -> float:
    """Mean over the seeds."""
    return statistics.fmean(values.values())


def difference(mine: dict[int, float], other: dict[int, float]) -> Estimate | None:
    """Mine minus the other's, in the seeds that both have; None without one."""
    common = sorted(set(mine) & set(other))
    return Estimate(tuple(mine[seed] - other[seed] for seed in common)) if common else None


def slope_per_doubling(by_batch: dict[int, dict[int, float]]) -> Estimate | None:
    """Least-squares slope over log2 of the batch size, for each seed that has all batch sizes."""
    if len(by_batch) < 2:
        return None
    x = [math.log2(batch) for batch in by_batch]
    centre = statistics.fmean(x)
    common = set.intersection(*(set(values) for values in by_batch.values()))
    slopes = []
    for seed in sorted(common):
        y = [values[seed] for values in by_batch.values()]
        slopes.append(sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x))
    return Estimate(tuple(slopes)) if slopes else None


def _data(rows: Sequence[Row]) -> list[str]:
    return sorted({row["data"] for row in rows})


def _batches(rows: Sequence[Row], data: str) -> list[int]:
    """Batch sizes that both heads were trained at, as in the paper."""
    found = {
        batch
        for batch in {row["batch_size"] for row in rows}
        if all(accuracies(rows, data=data, head=head, batch_size=batch) for head in ("cls", "ifa"))
    }
    return sorted(found)


def _verdict(estimates: Sequence[Estimate], wanted: int) -> str:
    """Confirmed where all have the wanted sign, not confirmed where one has the other."""
    if any(estimate.sign == -wanted for estimate in estimates):
        return REFUTED
    return CONFIRMED if all(estimate.sign == wanted for estimate in estimates) else UNDECIDED


def _answer(question: str, verdict: str, evidence: str) -> dict[str, str]:
    return {"question": question, "verdict": verdict, "evidence": evidence}


def _falls_with_the_batch(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    slopes, evidence = [], []
    for data in _data(rows):
        batches = _batches(rows, data)
        by_batch = {batch: accuracies(rows, data=data, head="cls", batch_size=batch) for batch in batches}
        slope = slope_per_doubling(by_batch)
        if slope is None:
            continue
        slopes.append(slope)
        levels = ", ".join(f"{batch}: {mean_of(values):.1f} %" for batch, values in by_batch.items())
        evidence.append(f"{data}, CLS: {slope} points per doubling ({levels})")
    if slopes:
        question = "Does accuracy fall with the batch size, at a fixed rate and number of epochs?"
        yield _answer(question, _verdict(slopes, -1), "; ".join(evidence))


def _gains(rows: Sequence[Row], data: str) -> dict[int, dict[int, float]]:
    """IFA minus CLS by batch size and seed."""
    gains = {}
    for batch in _batches(rows, data):
        cls, ifa = (accuracies(rows, data=data, head=head, batch_size=batch) for head in ("cls", "ifa"))
        gains[batch] = {seed: ifa[seed] - cls[seed] for seed in sorted(set(cls) & set(ifa))}
    return {batch: values for batch, values in gains.items() if values}


def _ifa_helps(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    largest, evidence = [], []
    for data in _data(rows):
        gains = {batch: Estimate(tuple(values.values())) for batch, values in _gains(rows, data).items()}
        if gains:
            largest.append(gains[max(gains)])
            evidence.append(f"{data}: " + ", ".join(f"batch {batch} {gain}" for batch, gain in gains.items()))
    if largest:
        question = "Is IFA better than CLS at the largest batch size, with the heads started as in the paper?"
        yield _answer(question, _verdict(largest, 1), "IFA minus CLS in points, " + "; ".join(evidence))


def _gain_grows(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    slopes, evidence = [], []
    for data in _data(rows):
        slope = slope_per_doubling(_gains(rows, data))
        if slope is not None:
            slopes.append(slope)
            evidence.append(f"{data}: {slope} points per doubling")
    if slopes:
        question = "Does IFA's gain over CLS grow with the batch size?"
        yield _answer(question, _verdict(slopes, 1), "; ".join(evidence))


def _largest_with(rows: Sequence[Row], **conditions: Any) -> int | None:
    wanted = BASE | conditions
    found = [row["batch_size"] for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return max(found, default=None)


def _closes_the_gap(
    rows: Sequence[Row], question: str, changes: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[dict[str, str]]:
    """How much of what the largest batch size loses against the smallest, under the paper's rule and with CLS, a change
    regains. `confirmed` where it is at least nine tenths of it, `not confirmed` where the change stays below the
    smallest by the rule of this module."""
    verdicts, evidence = [], []
    for what, change in changes:
        batch = _largest_with(rows, data="drawn", head="cls", **change)
        batches = _batches(rows, "drawn")
        if batch is None or not batches or batch == batches[0]:
            continue
        small = accuracies(rows, data="drawn", head="cls", batch_size=batches[0])
        fixed = accuracies(rows, data="drawn", head="cls", batch_size=batch)
        changed = accuracies(rows, data="drawn", head="cls", batch_size=batch, **change)
        short, gained = difference(changed, small), difference(changed, fixed)
        gap = mean_of(small) - mean_of(fixed)
        if short is None or gained is None or gap <= 0:
            continue
        regained = (mean_of(changed) - mean_of(fixed)) / gap
        closed = regained >= CLOSED and gained.sign > 0
        verdicts.append(CONFIRMED if closed else REFUTED if short.sign < 0 else UNDECIDED)
        evidence.append(
            f"{what}: {mean_of(changed):.1f} % at batch {batch} ({mean_of(fixed):.1f} % at the fixed rate, "
            f"{mean_of(small):.1f} % at batch {batches[0]}): {regained:.0%} of the gap "
            f"regained, {short} points to batch {batches[0]}"
        )
    if evidence:
        best = CONFIRMED if CONFIRMED in verdicts else UNDECIDED if UNDECIDED in verdicts else REFUTED
        yield _answer(question, best, "drawn, CLS, " + "; ".join(evidence))


def _still_adds(
    rows: Sequence[Row], question: str, changes: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[dict[str, str]]:
    gains, evidence = [], []
    for what, change in changes:
        batch = _largest_with(rows, data="drawn", head="ifa", **change)
        cls, ifa = (accuracies(rows, data="drawn", head=head, batch_size=batch, **change) for head in ("cls", "ifa"))
        gain = difference(ifa, cls)
        if gain is not None:
            gains.append(gain)
            evidence.append(f"{what}, batch {batch}: IFA {mean_of(ifa):.1f} %, CLS {mean_of(cls):.1f} %, {gain}")
    if gains:
        yield _answer(question, _verdict(gains, 1), "drawn, " + "; ".join(evidence))


_SCALED = (("linear", {"lr_scaling": "linear"}), ("square root", {"lr_scaling": "sqrt"}))
_STEPS = (("equal steps", {"budget": "steps"}),)


def _rate_scaling(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    yield from _closes_the_gap(rows, "Does scaling the rate with the batch size close the gap?", _SCALED)


def _ifa_beside_rate_scaling(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    yield from _still_adds(rows, "Does IFA still add to a scaled rate?", _SCALED)


def _equal_steps(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """With equal steps the question is whether the large batch is as good as the small one with as many steps."""
    batch = _largest_with(rows, data="drawn", head="cls", budget="steps")
    batches = _batches(rows, "drawn")
    if batch is None or not batches or batch == batches[0]:
        return
    small, large = (
        accuracies(rows, data="drawn", head="cls", batch_size=size, budget="steps") for size in (batches[0], batch)
    )
    gap = difference(large, small)
    if gap is not None:
        yield _answer(
            "At equal steps instead of equal epochs, is the largest batch size as good as the smallest?",
            CONFIRMED if gap.sign >= 0 and gap.mean >= 0 else REFUTED if gap.sign < 0 else UNDECIDED,
            f"drawn, CLS: {mean_of(large):.1f} % at batch {batch}, {mean_of(small):.1f} % at {batches[0]}, {gap}",
        )


def _ifa_beside_equal_steps(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    yield from _still_adds(rows, "Does IFA still add at equal steps?", _STEPS)


def _initialisation(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """The aggregation is what gains if IFA stays ahead under both common initialisations of the classifier."""
    gains, evidence = [], []
    batch = _largest_with(rows, data="drawn", head="cls", head_init="default")
    for what, cls_init, ifa_init in (
        ("both at PyTorch's default", "default", "reference"),
        ("both at zero", "reference", "zero"),
        ("as in the paper, CLS zero and IFA default", "reference", "reference"),
        ("both at PyTorch's default, the aggregation as the mean over the blocks", "default", "mean"),
    ):
        cls = accuracies(rows, data="drawn", head="cls", batch_size=batch, head_init=cls_init)
        ifa = accuracies(rows, data="drawn", head="ifa", batch_size=batch, head_init=ifa_init)
        gain = difference(ifa, cls)
        if gain is not None:
            gains.append(gain)
            evidence.append(f"{what}: {gain} ({mean_of(ifa):.1f} % and {mean_of(cls):.1f} %)")
    if len(gains) >= 3:
        question = "Is IFA's gain the aggregation, and not the start of the classifier?"
        yield _answer(question, _verdict(gains[:2], 1), f"drawn, batch {batch}, IFA minus CLS, " + "; ".join(evidence))


def _text(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    tokens = sorted({row["text_tokens"] for row in rows if row["text_tokens"]})
    batch = max((row["batch_size"] for row in rows if row["text_tokens"]), default=None)
    levels = {n: accuracies(rows, data="drawn", head="cls", batch_size=batch, text_tokens=n) for n in (0, *tokens)}
    if not tokens or not levels[0]:
        return
    shown = ", ".join(f"{n} tokens {mean_of(values):.1f} %" for n, values in levels.items() if values)
    helps = [estimate for n in tokens if (estimate := difference(levels[n], levels[0]))]
    gains = ", ".join(f"{n}: {estimate}" for n, estimate in zip(tokens, helps, strict=False))
    yield _answer("Do tags help?", _verdict(helps, 1), f"drawn, CLS, batch {batch}: {shown}; over none, {gains}")
    more = difference(levels[tokens[-1]], levels[tokens[0]])
    if len(tokens) > 1 and more is not None:
        evidence = f"drawn, CLS, batch {batch}: {tokens[-1]} against {tokens[0]} tokens {more} points"
        yield _answer("Do more text tokens help more?", _verdict([more], 1), evidence)


_FINER = {"backbone": "vit_tiny_patch16"}


def _patches(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    yield from _beside(rows, "Do smaller patches help?", "patches of 16 and 32 pixels", _FINER, {})


def _image_size(rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    smaller = _FINER | {"image_size": 32}
    yield from _beside(rows, "Do larger images help?", "images of 64 and 32 pixels, patches of 16", _FINER, smaller)


def _beside(
    rows: Sequence[Row], question: str, what: str, better: dict[str, Any], worse: dict[str, Any]
) -> Iterator[dict[str, str]]:
    batch = _largest_with(rows, data="drawn", head="cls", **better)
    mine, other = (accuracies(rows, data="drawn", head="cls", batch_size=batch, **change) for change in (better, worse))
    gain = difference(mine, other)
    if gain is not None:
        levels = f"{mean_of(mine):.1f} % and {mean_of(other):.1f} %"
        evidence = f"drawn, CLS, batch {batch}, {what}: {levels}, {gain} points"
        reached = {row["backbone"]: row["pretraining_top1"] for row in rows if "pretraining_top1" in row}
        names = [(BASE | change)["backbone"] for change in (better, worse)]
        if len(set(names)) > 1 and set(names) <= set(reached):
            evidence += f"; their pretraining reached {reached[names[0]]:.1%} and {reached[names[1]]:.1%}"
        yield _answer(question, _verdict([gain], 1), evidence)


def _smoother(surfaces: Sequence[Row]) -> Iterator[dict[str, str]]:
    """The paper shows one surface each; here the sharpness of several runs of each head at the largest batch size."""
    if not surfaces:
        return
    batch = max(row["batch_size"] for row in surfaces)
    sharp = {
        head: {
            row["seed"]: row["mean_excess_loss"]
            for row in surfaces
            if (row["head"], row["batch_size"]) == (head, batch)
        }
        for head in ("cls", "ifa")
    }
    less = difference(sharp["cls"], sharp["ifa"])
    if less is None:
        return
    levels = "; ".join(
        f"{head.upper()} " + ", ".join(f"{value:.3f}" for value in values.values()) for head, values in sharp.items()
    )
    yield _answer(
        "Is IFA's loss surface smoother at the largest batch size?",
        _verdict([less], 1),
        f"drawn, batch {batch}: mean excess loss over the filter-normalised disc, a run each: {levels}",
    )
