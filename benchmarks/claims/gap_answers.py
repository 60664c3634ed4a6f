"""What the runs of the benchmark `gap` answer; what counts as a difference is in `study_runs.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.claims.gap_runs import ADAMW, FIXED, accuracies
from benchmarks.claims.study_runs import Seeds, slope_per_doubling
from benchmarks.tables import Row, by

Answer = dict[str, str]
YES, NO, UNDECIDED = "yes", "no", "undecided"
EXPLAINED = 95.0
"""Percent of the gap from which it counts as explained."""


def answer_questions(rows: Sequence[Row], batches: Sequence[int]) -> list[Answer]:
    """Question, verdict and evidence of every question that the rows have runs for."""
    heads, remedies = list(by(rows, "head")), [name for name in by(rows, "remedy") if name != FIXED]
    found = [_falls(rows, heads, batches)]
    found += [_closes(rows, heads, remedy, batches) for remedy in remedies]
    found.append(_explained(rows, heads, remedies, batches))
    found += [_adds(rows, head, FIXED, batches) for head in heads if head != "cls"]
    best = closers(rows, heads, remedies, batches)
    if best:
        found += [_adds(rows, head, best[0][0], batches) for head in heads if head != "cls"]
    return [answer for answer in found if answer]


def gap(rows: Sequence[Row], head: str, batches: Sequence[int]) -> Seeds:
    """Points that the smallest batch is above the largest, at one rate and number of epochs."""
    return accuracies(rows, head, FIXED, batches[0]) - accuracies(rows, head, FIXED, batches[-1])


def closed(rows: Sequence[Row], head: str, remedy: str, batches: Sequence[int]) -> Seeds:
    """Percent of the gap that a remedy wins back at the largest batch; empty where there is no gap.

    The mean is that of what is won over that of what was lost. What a seed adds to it is linear in both (the delta
    method), so that the error is the ratio's: the runs at the largest batch are in both.
    """
    lost = gap(rows, head, batches)
    if not lost or lost.sign <= 0:
        return Seeds()
    won = accuracies(rows, head, remedy, batches[-1]) - accuracies(rows, head, FIXED, batches[-1])
    lost = Seeds({seed: lost[seed] for seed in sorted(won.keys() & lost.keys())})
    if not lost:
        return Seeds()
    share = sum(won[seed] for seed in lost) / sum(lost.values())
    return Seeds({seed: 100 * (share + (won[seed] - share * lost[seed]) / lost.mean) for seed in lost})


def closers(
    rows: Sequence[Row], heads: Sequence[str], remedies: Sequence[str], batches: Sequence[int]
) -> list[tuple[str, float]]:
    """(remedy, percent of the gap that it wins back on average over the heads with a gap), the best first. Without
    those by which a run of such a head diverged, of the others alone the mean would be too good, and without those
    that are not `complete`."""
    losing = _losing(rows, heads, batches)
    means = []
    for remedy in remedies:
        if complete(rows, losing, remedy, batches) and not any(diverged(rows, head, remedy) for head in losing):
            shares = [closed(rows, head, remedy, batches).mean for head in losing]
            means.append((remedy, sum(shares) / len(shares)))
    return sorted(means, key=lambda pair: -pair[1])


def _losing(rows: Sequence[Row], heads: Sequence[str], batches: Sequence[int]) -> list[str]:
    return [head for head in heads if (lost := gap(rows, head, batches)) and lost.sign > 0]


def complete(rows: Sequence[Row], losing: Sequence[str], remedy: str, batches: Sequence[int]) -> bool:
    """Whether the remedy has runs of at least two seeds, finite or not, of every head that loses."""
    counts = [diverged(rows, head, remedy) + len(closed(rows, head, remedy, batches)) for head in losing]
    return bool(counts) and min(counts) > 1


def diverged(rows: Sequence[Row], head: str, remedy: str) -> int:
    """Runs of the head under the remedy whose loss was not finite."""
    return sum(1 for row in rows if row["head"] == head and row["remedy"] == remedy and row.get("diverged"))


def _answer(question: str, verdict: str, evidence: str) -> Answer:
    return {"question": question, "verdict": verdict, "evidence": evidence}


def _of_signs(signs: Sequence[int]) -> str:
    """Yes where all are above 0, no where none is, else undecided."""
    return YES if signs and min(signs) > 0 else NO if signs and max(signs) < 0 else UNDECIDED


def _falls(rows: Sequence[Row], heads: Sequence[str], batches: Sequence[int]) -> Answer | None:
    said, signs = [], []
    for head in heads:
        levels = {batch: its for batch in batches if (its := accuracies(rows, head, FIXED, batch))}
        slope = slope_per_doubling(levels)
        if slope:
            shown = ", ".join(f"{batch}: {its.mean:.1f}" for batch, its in levels.items())
            said.append(f"{head} {slope} points a doubling ({shown} %)")
            signs.append(-slope.sign)
    question = "Does accuracy fall with the batch size, at one rate and number of epochs?"
    return _answer(question, _of_signs(signs), "; ".join(said)) if said else None


def _closes(rows: Sequence[Row], heads: Sequence[str], remedy: str, batches: Sequence[int]) -> Answer | None:
    said, whole = [], []
    for head in heads:
        if gone := diverged(rows, head, remedy):
            said.append(f"{head}: {gone} runs diverged")
            whole.append(False)
        elif share := closed(rows, head, remedy, batches):
            short = accuracies(rows, head, remedy, batches[-1]) - accuracies(rows, head, FIXED, batches[0])
            said.append(f"{head}: {share} % ({short} points to batch {batches[0]})")
            whole.append(share.mean >= EXPLAINED and share.sign > 0)
    if not said:
        return None
    question = f"Does `{remedy}` win back what batch {batches[-1]} loses?"
    verdict = YES if all(whole) else NO if not any(whole) else "for some heads"
    if not complete(rows, _losing(rows, heads, batches), remedy, batches):
        verdict = UNDECIDED  # by one seed, or of some heads
    return _answer(question, verdict, "share of the gap won back: " + "; ".join(said))


def _explained(
    rows: Sequence[Row], heads: Sequence[str], remedies: Sequence[str], batches: Sequence[int]
) -> Answer | None:
    best = closers(rows, heads, remedies, batches)
    if not best:
        return None
    shown = ", ".join(f"{remedy} {share:.0f} %" for remedy, share in best)
    losing = _losing(rows, heads, batches)
    unfinished = [remedy for remedy in remedies if not complete(rows, losing, remedy, batches)]
    others = [remedy for remedy in remedies if remedy not in (*dict(best), *unfinished)]
    shown += f"; runs diverged: {'; '.join(others)}" if others else ""
    shown += f"; without the runs of two seeds of each head: {'; '.join(unfinished)}" if unfinished else ""
    question = f"Is at least {EXPLAINED:.0f} % of the gap explained by one of them?"
    verdict = YES if best[0][1] >= EXPLAINED else UNDECIDED if unfinished else NO
    return _answer(question, verdict, f"mean over the heads that have a gap: {shown}")


def _adds(rows: Sequence[Row], head: str, remedy: str, batches: Sequence[int]) -> Answer | None:
    """A head beside CLS, under one remedy, at the smallest batch (where it is the same for all) and the largest."""
    said, last = [], None
    places: list[tuple[str, str, int]] = [("", remedy, batches[-1])]
    if remedy in (FIXED, ADAMW):
        places.insert(0, ("", remedy, batches[0]))
    for _, name, batch in places:
        gain = accuracies(rows, head, name, batch) - accuracies(rows, "cls", name, batch)
        if gain:
            said.append(f"batch {batch} {gain}")
            last = gain
    if last is None:
        return None
    how = "at the fixed rate" if remedy == FIXED else f"when the gap is closed by `{remedy}`"
    question = f"Is `{head}` better than CLS at batch {batches[-1]} {how}?"
    return _answer(question, _of_signs([last.sign]), f"{head} less CLS in points: " + ", ".join(said))


def table_rows(rows: Sequence[Row], batches: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each head: mean and standard error at each batch size, and under each remedy at the largest."""
    found = []
    for head in by(rows, "head"):
        row: dict[str, Any] = {"head": head}
        for batch in batches:
            row[f"batch {batch}"] = _level(accuracies(rows, head, FIXED, batch))
        for remedy in by(rows, "remedy"):
            if remedy != FIXED:
                gone = diverged(rows, head, remedy)
                level = _level(accuracies(rows, head, remedy, batches[-1]))
                row[remedy] = "; ".join(filter(None, (level, f"{gone} diverged" if gone else "")))
        found.append(row)
    return found


def _level(seeds: Seeds) -> str:
    return f"{seeds.mean:.1f} ± {seeds.error:.1f}" if len(seeds) > 1 else f"{seeds.mean:.1f}" if seeds else ""
