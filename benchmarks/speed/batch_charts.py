"""Figures over the batch size, which the benchmarks `step` and `batch_size` both have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.benchmark import Chart
from benchmarks.charts import bars, lines
from benchmarks.tables import Row, having, short_backbone


def over_batches(rows: Sequence[Row], memory: str) -> list[Chart]:
    """Throughput and memory over the batch size; bars of the throughput where there is one size. memory: its key."""
    charts = []
    gone = [row["batch_size"] for row in having(rows, "batch_size") if row.get("out_of_memory")]
    for key, name, what in (("images_per_s", "throughput", "images/s"), (memory, "memory", "peak memory, MB")):
        measured = having(rows, "batch_size", key)
        if len({row["batch_size"] for row in measured}) > 1:
            caption = f"{what[0].upper()}{what[1:]} over the batch size" + (
                "; a cross: out of memory." if gone else "."
            )
            charts.append(Chart(name, caption, partial(lines, points_of(measured, key), what, crosses=gone)))
        elif measured and key == "images_per_s":
            named = [(way or "measured", row[key]) for way, its in series_of(measured).items() for row in its]
            label = f"{what}, batch {measured[0]['batch_size']:,}"
            draw = partial(bars, [way for way, _ in named], [value for _, value in named], label)
            charts.append(Chart(name, "Images per second.", draw))
    return charts


def points_of(
    rows: Sequence[Row], key: str, scale: float = 1, by_way: bool = True
) -> dict[str, list[tuple[float, float]]]:
    """The points of each line: batch size, and what the rows have under the key times `scale`."""
    series = series_of(rows, by_way)
    return {name: [(row["batch_size"], scale * row[key]) for row in its] for name, its in series.items()}


def series_of(rows: Sequence[Row], by_way: bool = True) -> dict[str, list[Row]]:
    """The rows by what tells lines over the batch size apart, under a name of what differs. by_way: micro-batches and
    model.compile do, which change what a step costs and not what it learns."""
    words: dict[str, Callable[[Row], str]] = {
        "arm": lambda row: str(row.get("arm", "")).replace("_", " "),
        "backbone": lambda row: short_backbone(row.get("backbone", "")),
        "head": lambda row: str(row.get("head", "")).upper(),
        "text_tokens": lambda row: f"{row.get('text_tokens') or 0} tokens",
        "image_size": lambda row: f"{row.get('image_size')} px",
        "precision": lambda row: str(row.get("precision", "")),
        "zero_stage": lambda row: f"ZeRO {row.get('zero_stage')}",
    }
    if by_way:
        words["compile"] = lambda row: "eager" if row.get("compile") == "none" else str(row.get("compile") or "")
    differ = [key for key in words if len({row.get(key) for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = [words[key](row) for key in differ]
        if by_way and row.get("micro_batch") not in (None, row.get("batch_size")):
            parts.append(f"in micro-batches of {row['micro_batch']}")
        found.setdefault(", ".join(part for part in parts if part), []).append(row)
    return {name: sorted(its, key=lambda row: row["batch_size"]) for name, its in found.items()}
