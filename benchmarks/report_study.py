"""Statistics of the study's runs over their seeds, for its table and its figures.

A configuration is everything that a run is but its head and seed. Accuracies are test top-1 in percent.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.questions import difference
from benchmarks.tables import short_backbone

Row = dict[str, Any]
BySeed = dict[int, float]

# What makes a configuration: key of a row, heading of the table.
FIELDS = (
    ("data", "data"),
    ("backbone", "backbone"),
    ("image_size", "px"),
    ("text_tokens", "text tokens"),
    ("batch_size", "batch"),
    ("lr_scaling", "rate scaling"),
    ("budget", "equal"),
    ("head_init", "head starts"),
)
# What each experiment varies.
VARIED = {
    "scaling": ("batch_size", "lr_scaling"),
    "steps": ("batch_size", "budget"),
    "init": ("batch_size", "head_init"),
    "text": ("text_tokens",),
    "patch": ("backbone", "image_size"),
}
_WORDS = {
    "lr_scaling": {"none": "fixed rate", "linear": "linear scaling", "sqrt": "square-root scaling"},
    "budget": {"epochs": "equal epochs", "steps": "equal steps"},
    "text_tokens": {0: "no text"},
}
_UNITS = {"batch_size": "batch {}", "image_size": "{} px", "text_tokens": "{} tokens", "head_init": "{} start"}


@dataclass(frozen=True)
class Category:
    """One place of a comparison: what it is, and the accuracy of each head in each seed."""

    label: str
    heads: dict[str, BySeed]


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter with fewer than two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(mine: BySeed, other: BySeed) -> tuple[float, float | None, int] | None:
    """Mean of mine minus other over the seeds that both have, its standard error (None for one seed), their number."""
    estimate = difference(mine, other)
    if estimate is None:
        return None
    return estimate.mean, None if math.isnan(estimate.error) else estimate.error, len(estimate.values)


def heads_of(rows: Sequence[Row]) -> list[str]:
    """The heads, CLS first."""
    return sorted({row["head"] for row in rows if row.get("head")}, key=lambda head: (head != "cls", head))


def plus_minus(mean: float, spread: float | None, form: str = ".2f") -> str:
    """`80.12 ± 0.34`; the mean alone where there is no spread."""
    return f"{mean:{form}}" + ("" if spread is None else f" ± {spread:.2f}")


def finished(rows: Sequence[Row]) -> list[Row]:
    """Rows with an accuracy, a head and a seed."""
    return [row for row in rows if row.get("top1") is not None and row.get("head") and row.get("seed") is not None]


def configuration_of(row: Row) -> tuple[Any, ...]:
    """What the row's run is but its head and seed."""
    return tuple(row.get(key) for key, _ in FIELDS)


def configurations(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, BySeed]]:
    """Accuracy in percent by configuration, head and seed, in order of appearance."""
    found: dict[tuple[Any, ...], dict[str, BySeed]] = {}
    for row in finished(rows):
        found.setdefault(configuration_of(row), {}).setdefault(row["head"], {})[row["seed"]] = 100 * row["top1"]
    return found


def base_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each head, what a run is where an experiment does not vary it: the commonest value of the runs over batch
    sizes, or of all runs if there are none."""
    base = {}
    for head in heads_of(rows):
        mine = [row for row in rows if row.get("head") == head]
        mine = [row for row in mine if row.get("experiment") == "batch"] or mine
        base[head] = {
            key: Counter(row.get(key) for row in mine).most_common(1)[0][0]
            for key, _ in FIELDS
            if key not in ("data", "batch_size")
        }
    return base


def over_batch_sizes(rows: Sequence[Row], data: str) -> dict[str, dict[int, BySeed]]:
    """Accuracy by head, batch size and seed, of the runs on the data that differ from the base in nothing else."""
    base = base_of(rows)
    found: dict[str, dict[int, BySeed]] = {head: {} for head in heads_of(rows)}
    for row in finished(rows):
        if row.get("data") == data and row.get("batch_size") and _is_base(row, base[row["head"]], ("batch_size",)):
            found[row["head"]].setdefault(row["batch_size"], {})[row["seed"]] = 100 * row["top1"]
    return {head: dict(sorted(by_batch.items())) for head, by_batch in found.items() if by_batch}


def comparison(rows: Sequence[Row], experiment: str, data: str) -> list[Category]:
    """The runs of an experiment beside those that it is compared with, smallest batch size and base first.

    The rate scaling is compared with the smallest batch size too, whose accuracy it is to regain.
    """
    rows = [row for row in finished(rows) if row.get("data") == data]
    own = [row for row in rows if row.get("experiment") == experiment]
    if not own:
        return []
    rows = [row for row in rows if row["head"] in heads_of(own)]
    varied, base = VARIED[experiment], base_of(rows)
    batches = {row.get("batch_size") for row in own}
    reference = [row for row in rows if row.get("experiment") == "batch"]
    if experiment == "scaling" and reference:
        batches.add(min(row["batch_size"] for row in reference))
    wanted = {tuple(row.get(key) for key in varied) for row in own}
    found: dict[tuple[Any, ...], dict[str, BySeed]] = {}
    for row in rows:
        place, usual = tuple(row.get(key) for key in varied), base[row["head"]]
        is_usual = all(row.get(key) == usual[key] for key in varied if key != "batch_size")
        same_else = row.get("batch_size") in batches and _is_base(row, usual, varied)
        if same_else and (place in wanted or is_usual):
            found.setdefault(place, {}).setdefault(row["head"], {})[row["seed"]] = 100 * row["top1"]

    def order(place: tuple[Any, ...]) -> tuple[Any, ...]:
        usual = base[next(iter(found[place]))]
        keys = [
            value if isinstance(value, int) else (value != usual.get(key), str(value))
            for key, value in zip(varied, place, strict=True)
        ]
        return tuple(str(key) if not isinstance(key, int) else f"{key:09d}" for key in keys)

    return [Category(_label(varied, place), found[place]) for place in sorted(found, key=order)]


def _is_base(row: Row, base: dict[str, Any], varied: Sequence[str]) -> bool:
    return all(row.get(key) == value for key, value in base.items() if key not in varied)


def _label(varied: Sequence[str], place: Sequence[Any]) -> str:
    parts = []
    for key, value in zip(varied, place, strict=True):
        words = _WORDS.get(key, {}).get(value) or _UNITS.get(key, "{}").format(value)
        parts.append(short_backbone(value) if key == "backbone" else words)
    return ", ".join(parts)
