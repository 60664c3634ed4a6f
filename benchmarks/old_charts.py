"""Figures of the report: what each costs, and the means to draw them.

A figure is narrow, so that it can be read on a telephone; several stand side by side where there is room. This module
is imported without matplotlib, which only drawing needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.benchmark import Chart
from benchmarks.tables import having, short_backbone

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
Document = dict[str, Any]

WIDTH, HEIGHT = 4.4, 3.3  # inches; 4.4 are 422 pixels of a page
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",
    "image.composite_image": False,
}
OURS, GREY, LIGHT, RED = "#0072b2", "#8a8a8a", "#d4d4d4", "#c02020"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAD_COLOURS = {"cls": "#0072b2", "ifa": "#d55e00", "stacked": "#8a8a8a"}
HEAD_MARKERS = {"cls": "o", "ifa": "s", "stacked": "^"}
SPENT = {"copies": "#0072b2", "norms": "#e69f00", "update": "#009e73", "collectives": "#cc79a7"}
PHASES = {"forward": "#56b4e9", "backward": "#0072b2", "step": "#e69f00"}


def cost_charts(bench: str, document: Document) -> list[Chart]:
    """The figures of a result about time, memory or money, as far as its rows have what they show."""
    rows = document.get("rows") or []
    if bench == "loader":
        return _loader_charts(rows, document.get("parameters") or {})
    if bench in ("step", "batch_size"):
        return _batch_charts(rows, "memory_mb" if bench == "step" else "peak_mb")
    if bench == "ifa":
        return _ifa_charts(rows)
    return _engine_charts(rows) if bench == "engine" else []


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the report's width with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    """A log2 axis with the batch sizes as its ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(batches)), [f"{batch:,}" for batch in sorted(set(batches))])
    axes.minorticks_off()
    axes.set_xlabel("batch size")


def named_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], colours: Sequence[str], texts: Sequence[str]
) -> None:
    """Horizontal bars from top to bottom, each with its name above it and its value at its end."""
    places = [-i for i in range(len(names))]
    axes.barh(places, values, height=0.42, color=colours)
    for place, name, value, text in zip(places, names, values, texts, strict=True):
        axes.annotate(plain(name), (0, place + 0.25), xytext=(2, 1), textcoords="offset points", fontsize=10)
        axes.annotate(text, (max(value, 0), place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10)
    axes.xaxis.set_major_formatter(_number)
    axes.set_yticks([])
    axes.set_ylim(-len(names) + 0.55, 0.8)
    axes.set_xlim(min(0, *values) * 1.05, max(*values, 0) * 1.22 or 1)
    axes.spines["left"].set_visible(False)
    axes.grid(False, axis="y")


def _number(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"


def plain(text: Any) -> str:
    """Text in which matplotlib finds no formula."""
    return str(text).replace("$", r"\$")


def _loader_charts(rows: Sequence[Row], parameters: dict[str, Any]) -> list[Chart]:
    rows = [row for row in having(rows, "images_per_s") if "bytes only" not in str(row.get("loader"))]
    if not rows:
        return []

    def draw() -> Figure:
        figure, axes = new_axes(0.52 * len(rows) + 0.8)
        names = [str(row.get("loader", "")) for row in rows]
        rates = [row["images_per_s"] for row in rows]
        colours = [OURS if name == "this project" else LIGHT if "ceiling" in name else GREY for name in names]
        named_bars(axes, names, rates, colours, [""] * len(rows))
        for i, row in enumerate(rows):
            low, high = (row.get(f"images_per_s_{which}") or row["images_per_s"] for which in ("lowest", "highest"))
            axes.plot([low, high], [-i, -i], color="#222222", linewidth=1.2, marker="|", markersize=5)
            axes.annotate(
                f"{row['images_per_s']:,.0f}", (high, -i), xytext=(5, 0), textcoords="offset points", va="center"
            )
        size, batch, threads = (plain(parameters.get(key, "?")) for key in ("size", "batch_size", "threads"))
        axes.set_xlabel(f"images/s to {size} px, batch {batch}, {threads} cores")
        return figure

    return [Chart("", "Images per second: median of the rounds, whiskers from the slowest to the fastest.", draw)]


def _batch_charts(rows: Sequence[Row], memory: str) -> list[Chart]:
    charts = []
    gone = [row["batch_size"] for row in having(rows, "batch_size") if row.get("out_of_memory")]
    for key, name, what in (
        ("images_per_s", "throughput", "images/s"),
        (memory, "memory", "peak memory, MB"),
    ):
        measured = having(rows, "batch_size", key)
        if len({row["batch_size"] for row in measured}) > 1:
            caption = f"{what[0].upper()}{what[1:]} over the batch size"
            caption += "; a cross: out of memory." if gone else "."
            charts.append(Chart(name, caption, partial(_draw_lines, measured, key, what, gone)))
        elif measured and name == "throughput":
            charts.append(Chart(name, "Images per second.", partial(_draw_bars, measured, key, what)))
    trained = having(rows, "batch_size", "top1")
    if len({row["batch_size"] for row in trained}) > 1:
        caption = "Test top-1 over the batch size, by head."
        charts.append(Chart("accuracy", caption, partial(_draw_lines, trained, "top1", "test top-1, %", [], scale=100)))
    cost = "train_price" if having(trained, "train_price") == trained else "train_minutes"
    if trained := cheapest(having(trained, cost), cost):
        caption = (
            "Accuracy against the cost of training: filled points are on the Pareto front, a ring marks what is "
            "recommended, numbers are batch sizes."
        )
        charts.append(Chart("pareto", caption, partial(_draw_pareto, trained, cost)))
    return charts


def cheapest(rows: Sequence[Row], cost: str) -> list[Row]:
    """One row for each batch size of each line: the way a batch is computed changes what a training
    costs, not what it learns."""
    best: dict[tuple[str, int], Row] = {}
    for name, its in series_of(rows, by_way=False).items():
        for row in its:
            point = (name, row["batch_size"])
            if point not in best or row[cost] < best[point][cost]:
                best[point] = row
    return list(best.values())


def series_of(rows: Sequence[Row], by_way: bool = True) -> dict[str, list[Row]]:
    """The rows by what tells lines over the batch size apart, under a name of what differs. by_way: micro-batches and
    model.compile do, which change what a step costs and not what it learns."""

    def accumulated(row: Row) -> str:
        micro = row.get("micro_batch")
        return "" if micro in (None, row.get("batch_size")) else f"in micro-batches of {micro}"

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
        words["compile"] = lambda row: {"none": "eager"}.get(row.get("compile"), str(row.get("compile") or ""))
    differ = [key for key in words if len({row.get(key) for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        parts = [words[key](row) for key in differ] + ([accumulated(row)] if by_way else [])
        found.setdefault(", ".join(part for part in parts if part), []).append(row)
    return {name: sorted(its, key=lambda row: row["batch_size"]) for name, its in found.items()}


def _draw_lines(rows: Sequence[Row], key: str, what: str, out_of_memory: Sequence[int], scale: float = 1) -> Figure:
    series = series_of(rows, by_way=key != "top1")
    figure, axes = new_axes(HEIGHT + 0.2 * max(0, len(series) - 3))
    for i, (name, its) in enumerate(series.items()):
        x, y = [row["batch_size"] for row in its], [scale * row[key] for row in its]
        axes.plot(x, y, color=COLOURS[i % 7], marker=MARKERS[i % 7], markersize=5, label=plain(name))
    for batch in sorted(set(out_of_memory)):
        axes.plot(batch, 0.97, "x", color=RED, markersize=8, transform=axes.get_xaxis_transform())
    batch_axis(axes, [*(row["batch_size"] for row in rows), *out_of_memory])
    axes.set_ylabel(what)
    if scale == 1:
        axes.set_ylim(0, max(row[key] for row in rows) * 1.12)
        axes.yaxis.set_major_formatter(_number)
    _legend(figure, series)
    return figure


def _legend(figure: Figure, names: Collection[str]) -> None:
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=1 if max(map(len, names)) > 16 else 2)


def _draw_bars(rows: Sequence[Row], key: str, what: str) -> Figure:
    names = [(name or "measured", row) for name, its in series_of(rows).items() for row in its]
    figure, axes = new_axes(0.52 * len(names) + 0.8)
    values = [row[key] for _, row in names]
    texts = [_number(value) for value in values]
    named_bars(axes, [name for name, _ in names], values, [OURS] * len(names), texts)
    axes.set_xlabel(f"{what}, batch {rows[0]['batch_size']:,}")
    return figure


def _draw_pareto(rows: Sequence[Row], cost: str) -> Figure:
    series = series_of(rows, by_way=False)
    figure, axes = new_axes(HEIGHT + 0.2 * max(1, len(series) - 2))
    for i, (name, its) in enumerate(series.items()):
        for row in its:
            axes.plot(
                row[cost],
                100 * row["top1"],
                MARKERS[i % 7],
                color=COLOURS[i % 7],
                markerfacecolor=COLOURS[i % 7] if row.get("pareto") else "white",
                label=plain(name) if row is its[0] else None,
            )
            at = (row[cost], 100 * row["top1"])
            axes.annotate(f"{row['batch_size']:,}", at, xytext=(5, 4), textcoords="offset points", fontsize=10)
            if row.get("recommended"):
                axes.plot(*at, "o", markersize=15, markerfacecolor="none", color=RED)
    front = sorted((row[cost], 100 * row["top1"]) for row in rows if row.get("pareto"))
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    axes.set_xlabel("price of a training" if cost == "train_price" else "minutes of a training")
    axes.set_ylabel("test top-1, %")
    axes.margins(0.1)
    _legend(figure, series)
    return figure


def _ifa_name(row: Row) -> str:
    text = f", {row['text_tokens']} text tokens" if row.get("text_tokens") else ""
    way = {"ifa": "IFA, ours", "stacked": "IFA, stacked"}.get(str(row.get("head")), str(row.get("head")))
    return f"{way}: {short_backbone(row.get('backbone', ''))}{text}"


def _ifa_charts(rows: Sequence[Row]) -> list[Chart]:
    rows = [row for row in rows if row.get("head") != "cls"]
    charts = []
    if timed := having(rows, "time_over_cls"):
        caption = "Time of a training step over that of the CLS head: median and range of the pairs."
        charts.append(Chart("time", caption, partial(_draw_ratios, timed)))
    if weighed := having(rows, "peak_over_cls_in_bdl"):

        def draw() -> Figure:
            figure, axes = new_axes(0.52 * len(weighed) + 0.8)
            values = [row["peak_over_cls_in_bdl"] for row in weighed]
            colours = [HEAD_COLOURS.get(row.get("head", ""), GREY) for row in weighed]
            named_bars(axes, [_ifa_name(row) for row in weighed], values, colours, [f"{v:,.2f}" for v in values])
            axes.set_xlabel("peak over CLS, in (B, D, L) floats")
            return figure

        caption = "Peak memory over the CLS head's, in floats of one [CLS] of every block, (B, D, L)."
        charts.append(Chart("memory", caption, draw))
    return charts


def _draw_ratios(rows: Sequence[Row]) -> Figure:
    figure, axes = new_axes(0.52 * len(rows) + 0.8)
    axes.axvline(1, color="#222222", linewidth=1)
    for i, row in enumerate(rows):
        ratio = row["time_over_cls"]
        low, high = (row.get(f"time_over_cls_{which}") or ratio for which in ("lowest", "highest"))
        colour = HEAD_COLOURS.get(row.get("head", ""), GREY)
        axes.plot([low, high], [-i, -i], color=colour, linewidth=2)
        axes.plot(ratio, -i, HEAD_MARKERS.get(row.get("head", ""), "o"), color=colour)
        axes.annotate(
            f"{plain(_ifa_name(row))}: {ratio:.3f}",
            (0.01, -i + 0.18),
            xycoords=("axes fraction", "data"),
            fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
        )
    axes.set_ylim(-len(rows) + 0.6, 0.7)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("step time / CLS")
    return figure


def _engine_charts(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    for name, parts, said in (
        ("spent", SPENT, "what it is spent on (the host's own time in operators)"),
        ("phases", PHASES, "phase of the step"),
    ):
        keys = [f"{which}_{part}_ms_per_million" for which in ("ours", "default") for part in parts]
        complete = having(rows, *keys)
        reach = _reach(complete, list(parts))
        for stage in dict.fromkeys(row.get("zero_stage") for row in complete):
            its = [row for row in complete if row.get("zero_stage") == stage]
            caption = (
                f"ZeRO {stage}: time over a bare loop's step, by {said}. A diamond: the whole difference, measured by "
                "itself."
            )
            charts.append(Chart(f"{name}-{stage}", caption, partial(_draw_engine, its, parts, reach)))
    return charts


def _reach(rows: Sequence[Row], parts: Sequence[str]) -> tuple[float, float]:
    """Ends of the axis that the figures of all ZeRO stages share."""
    ends = [0.0]
    for row in rows:
        for which in ("ours", "default"):
            values = [row[f"{which}_{part}_ms_per_million"] for part in parts]
            ends += [sum(value for value in values if value < 0), sum(value for value in values if value > 0)]
            ends += [each[f"{which}_excess_ms_per_million"] for each in having([row], f"{which}_excess_ms_per_million")]
    margin = 0.04 * (max(ends) - min(ends)) or 1
    return min(ends) - margin, max(ends) + margin


def _draw_engine(rows: Sequence[Row], parts: dict[str, str], reach: tuple[float, float]) -> Figure:
    figure, axes = new_axes(0.9 * len(rows) + 1.2)
    place = 0
    for row in rows:
        for which, name in (("ours", "ours"), ("default", "DeepSpeed's defaults")):
            ends = {1: 0.0, -1: 0.0}
            for part, colour in parts.items():
                value = row[f"{which}_{part}_ms_per_million"]
                side = 1 if value >= 0 else -1
                axes.barh(place, value, left=ends[side], height=0.38, color=colour, label=part if place == 0 else None)
                ends[side] += value
            if having([row], f"{which}_excess_ms_per_million"):
                axes.plot(row[f"{which}_excess_ms_per_million"], place, "D", color="black", markersize=5)
            axes.annotate(
                f"micro-batch {plain(row.get('micro_batch', '?'))}, {name}",
                (0.01, place + 0.31),
                xycoords=("axes fraction", "data"),
                fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            )
            place -= 1
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlim(reach)
    axes.set_ylim(place + 0.6, 0.8)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms per million parameters over a bare loop")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
