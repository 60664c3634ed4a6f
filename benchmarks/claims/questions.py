"""What the runs of the study answer: each question with a verdict by a rule fixed beforehand, and the figures.

What counts as a difference is in `benchmarks/claims/study_runs.py`; where it does not count, a question is undecided.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.claims.study_runs import (
    BASE,
    DRAWN,
    HEADS,
    Seeds,
    accuracies,
    is_run,
    share_of,
    slope_per_doubling,
)
from benchmarks.tables import Row, having

Answer = dict[str, str]
Changes = dict[str, dict[str, Any]]
"""Changes of a run that a question compares: what a change is called, and its keys."""

CONFIRMED, REFUTED, UNDECIDED = "confirmed", "not confirmed", "undecided"
CLOSED = 0.9
"""Share of a gap from which it counts as closed."""
SCALED: Changes = {"linear": {"lr_scaling": "linear"}, "square root": {"lr_scaling": "sqrt"}}
STEPS: Changes = {"equal steps": {"budget": "steps"}}
FINER: dict[str, Any] = {"backbone": "vit_tiny_patch16"}


def answer_questions(rows: Sequence[Row], surfaces: Sequence[Row] = ()) -> list[Answer]:
    """Question, verdict and evidence, as far as the rows go. surfaces: rows of `benchmarks landscape`, each with what
    its run was."""
    answers = (
        _falls_with_the_batch(rows),
        _ifa_helps(rows),
        _gain_grows(rows),
        _scaling_closes_the_gap(rows),
        _still_adds(rows, "Does IFA still add to a scaled rate?", SCALED),
        _equal_steps(rows),
        _still_adds(rows, "Does IFA still add at equal steps?", STEPS),
        _initialisation(rows),
        _tags(rows),
        _more_tags(rows),
        _beside(rows, "Do smaller patches help?", "patches of 16 and 32 pixels", FINER, {}),
        _beside(
            rows,
            "Do larger images help?",
            "images of 64 and 32 pixels, patches of 16",
            FINER,
            FINER | {"image_size": 32},
        ),
        _smoother(surfaces),
    )
    return [answer for answer in answers if answer]


def _verdict(differences: Sequence[Seeds], wanted: int) -> str:
    """Confirmed where all have the wanted sign, not confirmed where one has the other."""
    signs = [difference.sign for difference in differences]
    if -wanted in signs:
        return REFUTED
    return CONFIRMED if set(signs) == {wanted} else UNDECIDED


def _answer(
    question: str, wanted: int, found: Iterable[tuple[Seeds, str]], before: str = "", decisive: int | None = None
) -> Answer | None:
    """The answer by differences and what is said of each; None without one. decisive: so many of them decide."""
    found = list(found)
    if not found:
        return None
    verdict = _verdict([difference for difference, _ in found[:decisive]], wanted)
    return {"question": question, "verdict": verdict, "evidence": before + "; ".join(said for _, said in found)}


def _drawn(rows: Sequence[Row], **conditions: Any) -> Seeds:
    """Accuracies on the drawn characters, of the CLS head unless the conditions name another."""
    return accuracies(rows, **{"data": DRAWN, "head": "cls"} | conditions)


def _data(rows: Sequence[Row]) -> list[str]:
    return sorted({row["data"] for row in rows})


def _batches(rows: Sequence[Row], data: str) -> list[int]:
    """Batch sizes that both heads were trained at, as in the paper."""
    batches = sorted({row["batch_size"] for row in rows})
    return [b for b in batches if all(accuracies(rows, data=data, head=head, batch_size=b) for head in HEADS)]


def _largest(rows: Sequence[Row], **conditions: Any) -> int | None:
    """The largest batch size on the drawn characters under the conditions."""
    return max((row["batch_size"] for row in rows if is_run(row, data=DRAWN, **conditions)), default=None)


def _gains(rows: Sequence[Row], data: str) -> dict[int, Seeds]:
    """IFA minus CLS by batch size."""
    gains = {}
    for batch in _batches(rows, data):
        cls, ifa = (accuracies(rows, data=data, head=head, batch_size=batch) for head in HEADS)
        gains[batch] = ifa - cls
    return {batch: gain for batch, gain in gains.items() if gain}


# ---------------------------------------------------------------------- the batch size
def _falls_with_the_batch(rows: Sequence[Row]) -> Answer | None:
    found = []
    for data in _data(rows):
        by_batch = {b: accuracies(rows, data=data, head="cls", batch_size=b) for b in _batches(rows, data)}
        if slope := slope_per_doubling(by_batch):
            levels = ", ".join(f"{batch}: {seeds.mean:.1f} %" for batch, seeds in by_batch.items())
            found.append((slope, f"{data}, CLS: {slope} points per doubling ({levels})"))
    return _answer("Does accuracy fall with the batch size, at a fixed rate and number of epochs?", -1, found)


def _ifa_helps(rows: Sequence[Row]) -> Answer | None:
    found = []
    for data in _data(rows):
        if gains := _gains(rows, data):
            said = ", ".join(f"batch {batch} {gain}" for batch, gain in gains.items())
            found.append((gains[max(gains)], f"{data}: {said}"))
    question = "Is IFA better than CLS at the largest batch size, with the heads started as in the paper?"
    return _answer(question, 1, found, "IFA minus CLS in points, ")


def _gain_grows(rows: Sequence[Row]) -> Answer | None:
    slopes = {data: slope_per_doubling(_gains(rows, data)) for data in _data(rows)}
    found = [(slope, f"{data}: {slope} points per doubling") for data, slope in slopes.items() if slope]
    return _answer("Does IFA's gain over CLS grow with the batch size?", 1, found)


# ---------------------------------------------------------------------- other remedies than IFA
def _scaling_closes_the_gap(rows: Sequence[Row]) -> Answer | None:
    """How much of what the largest batch size loses against the smallest a scaled rate regains, with CLS. Confirmed
    where it is at least nine tenths of it, not confirmed where the accuracy stays below the smallest's."""
    verdicts, evidence = [], []
    smallest = min(_batches(rows, DRAWN), default=None)
    for what, change in SCALED.items():
        batch = _largest(rows, head="cls", **change)
        if batch is None or smallest is None or batch == smallest:
            continue
        small, fixed = _drawn(rows, batch_size=smallest), _drawn(rows, batch_size=batch)
        changed = _drawn(rows, batch_size=batch, **change)
        short, gained = changed - small, changed - fixed
        regained = share_of(gained, small - fixed)
        if not short or not regained:
            continue
        closed = regained.mean >= CLOSED and gained.sign > 0
        verdicts.append(CONFIRMED if closed else REFUTED if short.sign < 0 else UNDECIDED)
        evidence.append(
            f"{what}: {changed.mean:.1f} % at batch {batch} ({fixed.mean:.1f} % at the fixed rate, "
            f"{small.mean:.1f} % at batch {smallest}): {regained.mean:.0%} of the gap regained, "
            f"{short} points to batch {smallest}"
        )
    if not evidence:
        return None
    best = next(verdict for verdict in (CONFIRMED, UNDECIDED, REFUTED) if verdict in verdicts)
    question = "Does scaling the rate with the batch size close the gap?"
    return {"question": question, "verdict": best, "evidence": "drawn, CLS, " + "; ".join(evidence)}


def _equal_steps(rows: Sequence[Row]) -> Answer | None:
    """With equal steps the question is whether the large batch is as good as the small one with as many steps."""
    smallest, batch = min(_batches(rows, DRAWN), default=None), _largest(rows, head="cls", budget="steps")
    if batch is None or smallest is None or batch == smallest:
        return None
    small, large = (_drawn(rows, batch_size=size, budget="steps") for size in (smallest, batch))
    gap = large - small
    if not gap:
        return None
    return {
        "question": "At equal steps instead of equal epochs, is the largest batch size as good as the smallest?",
        "verdict": REFUTED if gap.sign < 0 else CONFIRMED if gap.mean >= 0 and len(gap) > 1 else UNDECIDED,
        "evidence": f"drawn, CLS: {large.mean:.1f} % at batch {batch}, {small.mean:.1f} % at {smallest}, {gap}",
    }


def _still_adds(rows: Sequence[Row], question: str, changes: Changes) -> Answer | None:
    found = []
    for what, change in changes.items():
        batch = _largest(rows, head="ifa", **change)
        cls, ifa = (_drawn(rows, head=head, batch_size=batch, **change) for head in HEADS)
        if gain := ifa - cls:
            found.append((gain, f"{what}, batch {batch}: IFA {ifa.mean:.1f} %, CLS {cls.mean:.1f} %, {gain}"))
    return _answer(question, 1, found, "drawn, ")


# ---------------------------------------------------------------------- the model and its input
def _initialisation(rows: Sequence[Row]) -> Answer | None:
    """The aggregation is what gains if IFA stays ahead under both common initialisations of the classifier."""
    found, decisive = [], 2
    batch = _largest(rows, head="cls", head_init="default")
    for what, cls_init, ifa_init in (
        ("both at PyTorch's default", "default", "reference"),
        ("both at zero", "reference", "zero"),
        ("as in the paper, CLS zero and IFA default", "reference", "reference"),
        ("both at PyTorch's default, the aggregation as the mean over the blocks", "default", "mean"),
    ):
        cls = _drawn(rows, batch_size=batch, head_init=cls_init)
        ifa = _drawn(rows, head="ifa", batch_size=batch, head_init=ifa_init)
        if gain := ifa - cls:
            found.append((gain, f"{what}: {gain} ({ifa.mean:.1f} % and {cls.mean:.1f} %)"))
        elif len(found) < decisive:
            return None
    question = "Is IFA's gain the aggregation, and not the start of the classifier?"
    return _answer(question, 1, found, f"drawn, batch {batch}, IFA minus CLS, ", decisive)


def _by_tokens(rows: Sequence[Row]) -> tuple[int | None, dict[int, Seeds]]:
    """The largest batch size with text, and the accuracies there by text tokens, from 0."""
    batch = max((row["batch_size"] for row in rows if row["text_tokens"]), default=None)
    tokens = sorted({0} | {row["text_tokens"] for row in rows})
    return batch, {n: _drawn(rows, batch_size=batch, text_tokens=n) for n in tokens}


def _tags(rows: Sequence[Row]) -> Answer | None:
    batch, levels = _by_tokens(rows)
    gains = {n: gain for n, seeds in levels.items() if n and (gain := seeds - levels[0])}
    if not gains:
        return None
    shown = ", ".join(f"{n} tokens {seeds.mean:.1f} %" for n, seeds in levels.items() if seeds)
    said = f"drawn, CLS, batch {batch}: {shown}; over none, " + ", ".join(f"{n}: {gain}" for n, gain in gains.items())
    return {"question": "Do tags help?", "verdict": _verdict(list(gains.values()), 1), "evidence": said}


def _more_tags(rows: Sequence[Row]) -> Answer | None:
    batch, levels = _by_tokens(rows)
    _, *tokens = levels
    if len(tokens) < 2 or not levels[0] or not (more := levels[tokens[-1]] - levels[tokens[0]]):
        return None
    said = f"drawn, CLS, batch {batch}: {tokens[-1]} against {tokens[0]} tokens {more} points"
    return _answer("Do more text tokens help more?", 1, [(more, said)])


def _beside(
    rows: Sequence[Row], question: str, what: str, better: dict[str, Any], worse: dict[str, Any]
) -> Answer | None:
    batch = _largest(rows, head="cls", **better)
    mine, other = (_drawn(rows, batch_size=batch, **change) for change in (better, worse))
    if not (gain := mine - other):
        return None
    said = f"drawn, CLS, batch {batch}, {what}: {mine.mean:.1f} % and {other.mean:.1f} %, {gain} points"
    reached = {row["backbone"]: row["pretraining_top1"] for row in rows if "pretraining_top1" in row}
    one, two = ((BASE | change)["backbone"] for change in (better, worse))
    if one != two and {one, two} <= set(reached):
        said += f"; their pretraining reached {reached[one]:.1%} and {reached[two]:.1%}"
    return _answer(question, 1, [(gain, said)])


def _smoother(surfaces: Sequence[Row]) -> Answer | None:
    """The paper shows one surface each; here the sharpness of several runs of each head at the largest batch size."""
    surfaces = [row for row in having(surfaces, "mean_excess_loss") if row["data"] == DRAWN]
    batch = max((row["batch_size"] for row in surfaces), default=None)
    cls, ifa = (
        Seeds({row["seed"]: row["mean_excess_loss"] for row in surfaces if is_run(row, head=head, batch_size=batch)})
        for head in HEADS
    )
    if not (less := cls - ifa):
        return None
    levels = "; ".join(
        f"{head.upper()} " + ", ".join(f"{value:.3f}" for value in seeds.values())
        for head, seeds in zip(HEADS, (cls, ifa), strict=True)
    )
    said = f"drawn, batch {batch}: mean excess loss over the filter-normalised disc, a run each: {levels}"
    return _answer("Is IFA's loss surface smoother at the largest batch size?", 1, [(less, said)])
