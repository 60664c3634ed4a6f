"""What the runs of the benchmark `gap` answer; what counts as a difference is in `study_runs.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.claims.gap_runs import FIXED, accuracies, diverged
from benchmarks.claims.study_runs import Seeds, share_of, slope_per_doubling, with_spread
from benchmarks.tables import Row, by

Answer = dict[str, str]
YES, NO, UNDECIDED = "yes", "no", "undecided"
EXPLAINED = 95.0
"""Percent of the gap from which it counts as explained."""


def answer_questions(rows: Sequence[Row], batches: Sequence[int]) -> list[Answer]:
    """Question, verdict and evidence of every question that the rows have runs for."""
    others = [head for head in by(rows, "head") if head != "cls"]
    found = [_falls(rows, batches)]
    found += [_closes(rows, remedy, batches) for remedy in remedies_of(rows)]
    found.append(_explained(rows, batches))
    for remedy in (FIXED, *(remedy for remedy, _ in closers(rows, batches)[:1])):
        found += [_adds(rows, head, remedy, batches) for head in others]
    return [answer for answer in found if answer]


def remedies_of(rows: Sequence[Row]) -> list[str]:
    """All but none, in order of appearance."""
    return [name for name in by(rows, "remedy") if name != FIXED]


def gap(rows: Sequence[Row], head: str, batches: Sequence[int]) -> Seeds:
    """Points that the smallest batch is above the largest, at one rate and number of epochs."""
    return accuracies(rows, head, FIXED, batches[0]) - accuracies(rows, head, FIXED, batches[-1])


def closed(rows: Sequence[Row], head: str, remedy: str, batches: Sequence[int]) -> Seeds:
    """Percent of the gap that a remedy wins back at the largest batch; empty where there is no gap, or none in the
    seeds that have the remedy."""
    lost = gap(rows, head, batches)
    if not lost or lost.sign <= 0:
        return Seeds()
    won = accuracies(rows, head, remedy, batches[-1]) - accuracies(rows, head, FIXED, batches[-1])
    return Seeds({seed: 100 * share for seed, share in share_of(won, lost).items()})


def closers(rows: Sequence[Row], batches: Sequence[int]) -> list[tuple[str, float]]:
    """(remedy, percent of the gap that it wins back on average over the heads with a gap), the best first. Without
    those by which a run of such a head diverged, of the others alone the mean would be too good, and without those
    that are not `complete`."""
    losing = _losing(rows, batches)
    means = []
    for remedy in remedies_of(rows):
        gone = any(diverged(rows, head, remedy, batches[-1]) for head in losing)
        if complete(rows, remedy, batches) and not gone:
            shares = [closed(rows, head, remedy, batches).mean for head in losing]
            means.append((remedy, sum(shares) / len(shares)))
    return sorted(means, key=lambda pair: -pair[1])


def _losing(rows: Sequence[Row], batches: Sequence[int]) -> list[str]:
    return [head for head in by(rows, "head") if (lost := gap(rows, head, batches)) and lost.sign > 0]


def complete(rows: Sequence[Row], remedy: str, batches: Sequence[int]) -> bool:
    """Whether the remedy has runs of at least two seeds, finite or not, of every head that loses."""
    counts = [
        diverged(rows, head, remedy, batches[-1]) + len(closed(rows, head, remedy, batches))
        for head in _losing(rows, batches)
    ]
    return bool(counts) and min(counts) > 1


def _answer(question: str, verdict: str, evidence: str) -> Answer:
    return {"question": question, "verdict": verdict, "evidence": evidence}


def _of_signs(signs: Sequence[int]) -> str:
    """Yes where all are above 0, no where none is, else undecided."""
    return YES if signs and min(signs) > 0 else NO if signs and max(signs) < 0 else UNDECIDED


def _falls(rows: Sequence[Row], batches: Sequence[int]) -> Answer | None:
    said, signs = [], []
    for head in by(rows, "head"):
        levels = {batch: its for batch in batches if (its := accuracies(rows, head, FIXED, batch))}
        slope = slope_per_doubling(levels)
        if slope:
            shown = ", ".join(f"{batch}: {its.mean:.1f}" for batch, its in levels.items())
            said.append(f"{head} {slope} points a doubling ({shown} %)")
            signs.append(-slope.sign)
    question = "Does accuracy fall with the batch size, at one rate and number of epochs?"
    return _answer(question, _of_signs(signs), "; ".join(said)) if said else None


def _closes(rows: Sequence[Row], remedy: str, batches: Sequence[int]) -> Answer | None:
    said, whole = [], []
    losing = _losing(rows, batches)
    for head in by(rows, "head"):
        if gone := diverged(rows, head, remedy, batches[-1]):
            said.append(f"{head}: {gone} runs diverged")
            if head in losing:
                whole.append(False)
        elif share := closed(rows, head, remedy, batches):
            short = accuracies(rows, head, remedy, batches[-1]) - accuracies(rows, head, FIXED, batches[0])
            said.append(f"{head}: {share} % ({short} points to batch {batches[0]})")
            whole.append(share.mean >= EXPLAINED and share.sign > 0)
    if not said:
        return None
    question = f"Does `{remedy}` win back what batch {batches[-1]} loses?"
    verdict = YES if all(whole) else NO if not any(whole) else "for some heads"
    if not complete(rows, remedy, batches):
        verdict = UNDECIDED  # by one seed, or of some heads
    return _answer(question, verdict, "share of the gap won back: " + "; ".join(said))


def _explained(rows: Sequence[Row], batches: Sequence[int]) -> Answer | None:
    best = closers(rows, batches)
    if not best:
        return None
    shown = ", ".join(f"{remedy} {share:.0f} %" for remedy, share in best)
    unfinished = [remedy for remedy in remedies_of(rows) if not complete(rows, remedy, batches)]
    others = [remedy for remedy in remedies_of(rows) if remedy not in (*dict(best), *unfinished)]
    shown += f"; runs diverged: {'; '.join(others)}" if others else ""
    shown += f"; without the runs of two seeds of each head: {'; '.join(unfinished)}" if unfinished else ""
    question = f"Is at least {EXPLAINED:.0f} % of the gap explained by one of them?"
    verdict = YES if best[0][1] >= EXPLAINED else UNDECIDED if unfinished else NO
    return _answer(question, verdict, f"mean over the heads that have a gap: {shown}")


def _adds(rows: Sequence[Row], head: str, remedy: str, batches: Sequence[int]) -> Answer | None:
    """A head beside CLS, under one remedy, at the largest batch, and as far as it has runs there at the smallest."""
    gains = {}
    for batch in (batches[0], batches[-1]):
        if gain := accuracies(rows, head, remedy, batch) - accuracies(rows, "cls", remedy, batch):
            gains[batch] = gain
    if batches[-1] not in gains:
        return None
    how = "at the fixed rate" if remedy == FIXED else f"when the gap is closed by `{remedy}`"
    question = f"Is `{head}` better than CLS at batch {batches[-1]} {how}?"
    said = ", ".join(f"batch {batch} {gain}" for batch, gain in gains.items())
    return _answer(question, _of_signs([gains[batches[-1]].sign]), f"{head} less CLS in points: {said}")


def table_rows(rows: Sequence[Row], batches: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each head: mean and standard error at each batch size, and under each remedy at the largest."""
    found = []
    for head in by(rows, "head"):
        row: dict[str, Any] = {"head": head}
        for batch in batches:
            row[f"batch {batch}"] = _level(accuracies(rows, head, FIXED, batch))
        for remedy in remedies_of(rows):
            gone = diverged(rows, head, remedy, batches[-1])
            level = _level(accuracies(rows, head, remedy, batches[-1]))
            row[remedy] = "; ".join(filter(None, (level, f"{gone} diverged" if gone else "")))
        found.append(row)
    return found


def _level(seeds: Seeds) -> str:
    return with_spread(seeds.mean, seeds.error, ".1f") if seeds else ""
