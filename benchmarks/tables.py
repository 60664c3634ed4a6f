"""Rows of results as text: values, tables and parts of sentences, for Markdown and HTML alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Document = dict[str, Any]
Columns = Sequence[tuple[str, str, str]]
"""Of each column: key of a row, heading, format ("": text)."""

FOLDED = 30
"""Rows from which the table of all rows is folded away where another table sums it up."""


@dataclass(frozen=True)
class Table:
    """A table of text. keys: of the rows, what is shown; numeric: of each column; marked: rows to stand out; folded:
    shown on demand; first: read before the figures."""

    title: str
    keys: list[str]
    headings: list[str]
    numeric: list[bool]
    cells: list[list[str]]
    marked: frozenset[int] = frozenset()
    folded: bool = False
    first: bool = False


def table_of(
    title: str, columns: Columns | None, rows: Sequence[Row], *, folded: bool = False, first: bool = False
) -> Table:
    """Those of the columns that any row has (None: all keys); what a row lacks, or holds as null, is left blank."""
    columns = generic_columns(rows) if columns is None else columns
    present = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row, key, form) for key, _, form in present] for row in rows]
    for row, texts in zip(rows, cells, strict=True):
        if "absent" in row:
            texts[-1] = f"not measured: {row['absent']}"
    return Table(
        title,
        [key for key, _, _ in present],
        [heading for _, heading, _ in present],
        [
            bool(form) or all(is_number(row[key]) for row in rows if row.get(key) is not None)
            for key, _, form in present
        ],
        cells,
        frozenset(i for i, row in enumerate(rows) if row.get("recommended") or row.get("loader") == "this project"),
        folded,
        first,
    )


def generic_columns(rows: Sequence[Row]) -> Columns:
    """Every key of the rows, in order of appearance, as a column."""
    return [(key, key.replace("_", " "), "") for key in dict.fromkeys(key for row in rows for key in row)]


def _cell(row: Row, key: str, form: str) -> str:
    if key == "step_ms" and row.get("out_of_memory") is True:  # of a step on a GPU it counts how often, before
        return "out of memory"
    return text_of(row.get(key), form)


def text_of(value: Any, form: str = "") -> str:
    """A value as text; a number without a format, or with one that does not fit, in four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if not form or (form.endswith("d") and isinstance(value, float)):
            form = ",d" if isinstance(value, int) else ",.0f" if abs(value) >= 1000 else ".4g"
        return format(value, form)
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def is_number(value: Any) -> bool:
    """Whether it is one; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def having(rows: Sequence[Row], *keys: str) -> list[Row]:
    """The rows in which all these keys are numbers."""
    return [row for row in rows if all(is_number(row.get(key)) for key in keys)]


def figures(rows: Sequence[Row], key: str) -> list[float]:
    """What the rows have under a key, where that is a number."""
    return [row[key] for row in having(rows, key)]


def by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """The rows by what they have under a key, as text, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(text_of(row.get(key)), []).append(row)
    return found


def span(values: Sequence[float], form: str) -> str:
    """`1.2 to 4.6`, or one number where both are written alike."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def rate(values: Sequence[float]) -> str:
    """A span of figures per second, large ones without a fraction."""
    return span(values, ",.0f" if min(values) >= 100 else ",.1f")


def short_backbone(name: Any) -> str:
    """`ViT tiny/16` for `vit_tiny_patch16`; other names as they are."""
    text = str(name)
    return "ViT " + text.removeprefix("vit_").replace("_patch", "/") if text.startswith("vit_") else text


def describe_row(row: Row, what: str) -> str:
    """One line: `what` was measured, and its figures."""
    figures = [f"{key} {value}" for key, value in row.items() if key not in _NAMED and value is not None]
    return f"{what}: {', '.join(figures)}"


# What tells a point from another says which it is; the line of its row repeats none of it, nor why it lacks a figure.
_NAMED = (
    *("what", "arm", "profiles", "backbone", "head", "text_tokens", "image_size", "batch_size", "micro_batch"),
    *("precision", "no_energy"),
)
