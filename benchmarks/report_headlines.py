"""What each result says in one sentence, made from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tables import Document, Row, figures, having, span, text_of

# In the order of the report; a bench that is not here comes after these.
BENCHES = {
    "study": "The paper's claims as questions, with seeds and controls",
    "paper": "The paper's tables, its numbers beside ours",
    "landscape": "Loss surfaces around trained weights",
    "precision": "What a precision costs in accuracy",
    "kill": "A run killed again and again beside an undisturbed one",
}


def _study(document: Document, rows: Sequence[Row]) -> str:
    verdicts = Counter(text_of(answer.get("verdict")) for answer in document.get("answers") or [])
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items() if verdict)
    return f"Of {verdicts.total()} questions {said}; {len(rows)} training runs" if said else ""


def _paper(_: Document, rows: Sequence[Row]) -> str:
    parts = []
    for scale in dict.fromkeys(text_of(row.get("scale")) for row in rows):
        run = having([row for row in rows if text_of(row.get("scale")) == scale], "top1")
        if run:
            # Only runs at full scale can be compared with the paper's.
            distances = [abs(distance) for distance in figures(run, "difference_points")]
            mean = sum(distances) / max(1, len(distances))
            distance = f", on average {mean:.1f} points from the paper's" if distances else ""
            parts.append(f"{len(run)} of {len(rows)} cells run at {scale} scale{distance}")
    return "; ".join(parts) or (f"{len(rows)} cells of the paper, none run" if rows else "")


def _landscape(_: Document, rows: Sequence[Row]) -> str:
    by_head = {
        head: figures([row for row in rows if row.get("head") == head], "mean_excess_loss")
        for head in dict.fromkeys(row.get("head") for row in rows)
    }
    parts = [f"{text_of(head).upper()} {span(values, '.3f')}" for head, values in by_head.items() if values]
    return f"Mean excess loss around the weights: {', '.join(parts)}" if parts else ""


def _precision(document: Document, _: Sequence[Row]) -> str:
    parts = []
    for row in having(document.get("differences") or [], "points", "standard_error"):
        points = f"{row['points']:+.2f} +- {row['standard_error']:.2f} points"
        parts.append(f"{row['precision']} is {points} from {row['compared_with']}")
    return ", ".join(parts)


def _kill(_: Document, rows: Sequence[Row]) -> str:
    kills = figures(rows, "kills")
    if not kills:
        return ""
    same = all(row.get("identical_weights") is True and row.get("each_sample_once") is True for row in rows)
    end = "weights bit-identical, each sample once per epoch" if same else "not all ended as the undisturbed run"
    ranks = ", ".join(f"{rank:g} rank{'s' * (rank != 1)}" for rank in figures(rows, "ranks"))
    return f"{sum(kills):,} kills{f' on {ranks}' if ranks else ''}: {end}"


_HEADLINES: dict[str, Callable[[Document, Sequence[Row]], Any]] = {
    "study": _study,
    "paper": _paper,
    "landscape": _landscape,
    "precision": _precision,
    "kill": _kill,
}
