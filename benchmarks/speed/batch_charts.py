"""Figures over the batch size, which the benchmarks `step` and `batch_size` both have, and those of accuracies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.charts import COLOURS, GREY, MARKERS, RED, Chart, bars, legend, lines, new_axes, plain
from benchmarks.speed.recommend import COSTS, cheapest_ways, front
from benchmarks.tables import Row, having, short_backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COST_LABELS = {
    "train_minutes": "minutes of a training",
    "train_price": "price of a training",
    "train_wh": "energy of a training, Wh",
}


def over_batches(rows: Sequence[Row], memory: str) -> list[Chart]:
    """Throughput and memory over the batch size; bars of the throughput where there is one size. memory: its key."""
    charts = []
    gone = [row["batch_size"] for row in having(rows, "batch_size") if row.get("out_of_memory") is True]
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
    # Eager ones first: so a head has the colour that it has where model.compile tells no lines apart.
    for row in sorted(rows, key=lambda row: row.get("compile") not in (None, "none")):
        parts = [words[key](row) for key in differ]
        if by_way and row.get("micro_batch") not in (None, row.get("batch_size")):
            parts.append(f"in micro-batches of {row['micro_batch']}")
        found.setdefault(", ".join(part for part in parts if part), []).append(row)
    return {name: sorted(its, key=lambda row: row["batch_size"]) for name, its in found.items()}


def of_accuracies(rows: Sequence[Row]) -> list[Chart]:
    """Accuracy over the batch size, and against each cost of training."""
    charts = []
    trained = having(rows, "batch_size", "top1")
    if len({row["batch_size"] for row in trained}) > 1:
        errors = {
            name: [100 * (row.get("top1_error") or 0) for row in its] for name, its in series_of(trained, False).items()
        }
        several = any(error > 0 for its in errors.values() for error in its)
        caption = "Test top-1 over the batch size, by head" + ("; bars: standard error over seeds." if several else ".")
        draw = partial(lines, points_of(trained, "top1", 100, by_way=False), "test top-1, %", zero=False, errors=errors)
        charts.append(Chart("accuracy", caption, draw))
    for cost, suffix in COSTS.items():
        if cheap := cheapest_ways(having(trained, cost), cost):
            caption = (
                f"Accuracy against the {COST_LABELS[cost]}: filled points are on the Pareto front, a ring marks what "
                "is recommended, numbers are batch sizes."
            )
            charts.append(Chart(f"pareto{suffix}", caption, partial(_draw_front, cheap, cost, suffix)))
    return charts


def _draw_front(rows: Sequence[Row], cost: str, suffix: str) -> Figure:
    series = series_of(rows, by_way=False)
    points = [(row[cost], row["top1"]) for row in rows]
    on_front = [point for point, there in zip(points, front(points), strict=True) if there]  # old rows do not say
    figure, axes = new_axes()
    for i, (name, its) in enumerate(series.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot([], [], linestyle="none", label=plain(name), **style)
        # Heads of one batch cost nearly the same: the numbers of each line have a side of their own.
        beside: dict[str, Any] = {"xytext": (6, 4)} if i % 2 == 0 else {"xytext": (-6, -4), "ha": "right", "va": "top"}
        for row in its:
            at, error = (row[cost], 100 * row["top1"]), 100 * (row.get("top1_error") or 0)
            fill = style["color"] if (row[cost], row["top1"]) in on_front else "white"
            if error:
                axes.errorbar(*at, yerr=error, fmt="none", ecolor=style["color"], elinewidth=1, capsize=3)
            axes.plot(*at, markerfacecolor=fill, linestyle="none", **style)
            axes.annotate(f"{row['batch_size']:,}", at, textcoords="offset points", color=style["color"], **beside)
            if row.get(f"recommended{suffix}"):
                axes.plot(*at, "o", markersize=15, markerfacecolor="none", color=RED)
    steps = sorted((price, 100 * top1) for price, top1 in on_front)
    axes.step(*zip(*steps, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(COST_LABELS[cost])
    axes.set_ylabel("test top-1, %")
    axes.margins(0.15, 0.1)
    legend(figure, len(series))
    return figure
