"""Figures of the report about what is learnt: the study's accuracies, the paper's numbers, loss surfaces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks import result
from benchmarks.benchmark import Chart
from benchmarks.charts import (
    COLOURS,
    GREY,
    HEAD_COLOURS,
    HEAD_MARKERS,
    MARKERS,
    RED,
    batch_axis,
    new_axes,
    plain,
)
from benchmarks.landscape_picture import shared_levels
from benchmarks.report_study import (
    BySeed,
    Category,
    comparison,
    finished,
    mean_and_sd,
    over_batch_sizes,
)
from benchmarks.tables import Document, Row, having, short_backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT_OF_SQUARE = 4.2
ARRAYS = ("a", "b", "loss", "t", "line_loss")
# What each experiment of the study asks.
ASKED = {
    "scaling": "scaling the rate with the batch size, beside the fixed rate",
    "steps": "equal steps, beside equal epochs",
    "init": "how the heads start",
    "text": "text tokens",
    "patch": "patches and image sizes",
}


def accuracy_charts(bench: str, document: Document) -> list[Chart]:
    """The figures of a result about accuracy or loss, as far as its rows have what they show."""
    rows = document.get("rows") or []
    if bench == "study":
        return _study_charts(rows)
    if bench == "paper":
        return _paper_charts(rows)
    return _landscape_charts(rows) if bench == "landscape" else []


def _study_charts(rows: Sequence[Row]) -> list[Chart]:
    charts = []
    rows = finished(rows)
    data = sorted({str(row["data"]) for row in rows if row.get("data")})
    for which in data:
        by_head = over_batch_sizes(rows, which)
        if any(len(by_batch) > 1 for by_batch in by_head.values()):
            caption = f"{which}: accuracy over the batch size at a fixed rate and number of epochs."
            charts.append(Chart(f"batch-{_slug(which)}", caption, partial(_draw_over_batch, by_head)))
    for experiment, asked in ASKED.items():
        for which in data:
            if len(categories := comparison(rows, experiment, which)) > 1:
                batches = sorted({row["batch_size"] for row in rows if _is_of(row, experiment, which)})
                at = "" if any("batch" in category.label for category in categories) else f", batch {batches[0]}"
                draw = partial(_draw_categories, categories)
                charts.append(Chart(f"{experiment}-{_slug(which)}", f"{which}{at}: {asked}.", draw))
    return charts


def _is_of(row: Row, experiment: str, data: str) -> bool:
    return row.get("experiment") == experiment and row.get("data") == data and bool(row.get("batch_size"))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "data"


def _spread(by_seed: BySeed) -> tuple[float, float, list[float]]:
    """Mean, standard deviation (0 without one) and the values."""
    values = list(by_seed.values())
    mean, sd = mean_and_sd(values)
    return mean, sd or 0, values


def _draw_over_batch(by_head: dict[str, dict[int, BySeed]]) -> Figure:
    figure, axes = new_axes()
    for i, (head, by_batch) in enumerate(by_head.items()):
        colour, marker = HEAD_COLOURS.get(head, COLOURS[i % 7]), HEAD_MARKERS.get(head, MARKERS[i % 7])
        # A little apart, so that the bars of one batch size do not hide each other.
        x = [batch * 2 ** (0.07 * (i - (len(by_head) - 1) / 2)) for batch in by_batch]
        spreads = [_spread(by_seed) for by_seed in by_batch.values()]
        axes.errorbar(
            x,
            [mean for mean, _, _ in spreads],
            yerr=[sd for _, sd, _ in spreads],
            color=colour,
            marker=marker,
            markersize=5,
            capsize=3,
            label=plain(head.upper()),
        )
        for place, (_, _, values) in zip(x, spreads, strict=True):
            axes.plot([place] * len(values), values, marker, color=colour, alpha=0.3, markersize=4, linestyle="none")
    batch_axis(axes, [batch for by_batch in by_head.values() for batch in by_batch])
    axes.set_ylabel("test top-1, %")
    figure.legend(loc="outside lower center", ncols=len(by_head))
    return figure


def _draw_categories(categories: Sequence[Category]) -> Figure:
    heads = list(dict.fromkeys(head for category in categories for head in category.heads))
    figure, axes = new_axes(0.62 * len(categories) + 1.1)
    named = set()
    for place, category in enumerate(categories):
        for i, (head, by_seed) in enumerate(category.heads.items()):
            y = -place - 0.17 * (i - (len(category.heads) - 1) / 2)
            colour = HEAD_COLOURS.get(head, COLOURS[heads.index(head) % 7])
            marker = HEAD_MARKERS.get(head, MARKERS[heads.index(head) % 7])
            mean, sd, values = _spread(by_seed)
            axes.plot(values, [y] * len(values), marker, color=colour, alpha=0.3, markersize=4, linestyle="none")
            label = None if head in named else plain(head.upper())
            axes.errorbar(mean, y, xerr=sd, color=colour, marker=marker, markersize=5, capsize=3, label=label)
            named.add(head)
        axes.annotate(
            plain(category.label),
            (0.01, -place + 0.24),
            xycoords=("axes fraction", "data"),
            fontsize=10,
        )
        axes.axhline(-place - 0.38, color="#eeeeee", linewidth=0.8)
    axes.set_yticks([])
    axes.set_ylim(-len(categories) + 0.6, 0.6)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("test top-1, %")
    if len(heads) > 1:
        figure.legend(loc="outside lower center", ncols=len(heads))
    return figure


def _paper_charts(rows: Sequence[Row]) -> list[Chart]:
    """Of the runs at full scale: another scale's are no answer to the paper's."""
    full = [row for row in rows if row.get("scale") == "full"]
    charts = []
    if run := having(full, "paper_top1", "top1"):
        caption = "Our top-1 over the paper's, a point a cell."
        labels = ("the paper's top-1, %", "ours, %")
        charts.append(Chart("top1", caption, partial(_draw_beside_paper, run, "paper_top1", "top1", labels)))
    if compared := having(full, "paper_difference_points", "our_difference_points"):
        caption = "What a cell gains over its baseline: ours over the paper's."
        labels = ("the paper's difference, points", "ours, points")
        draw = partial(_draw_beside_paper, compared, "paper_difference_points", "our_difference_points", labels)
        charts.append(Chart("differences", caption, draw))
    return charts


def _draw_beside_paper(rows: Sequence[Row], x: str, y: str, labels: tuple[str, str]) -> Figure:
    figure, axes = new_axes(HEIGHT_OF_SQUARE)
    values = [row[key] for row in rows for key in (x, y)]
    axes.plot([min(values), max(values)], [min(values), max(values)], color=GREY, linewidth=1)
    for i, table in enumerate(dict.fromkeys(str(row.get("table", "")) for row in rows)):
        its = [row for row in rows if str(row.get("table", "")) == table]
        label = plain(f"table {table}" if table.isdigit() else table)
        style = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "linestyle": "none"}
        axes.plot([row[x] for row in its], [row[y] for row in its], label=label, **style)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _landscape_charts(rows: Sequence[Row]) -> list[Chart]:
    """A contour picture of each run whose arrays are there, with the same levels, and their losses on the line."""
    with_arrays = [(row, _arrays_path(row)) for row in rows if row.get("arrays")]
    with_arrays = [(row, path) for row, path in with_arrays if path.exists()]
    charts = []
    finite = [path for _, path in with_arrays if np.isfinite(_read_arrays(path)["loss"]).any()]
    for i, (row, path) in enumerate(with_arrays if finite else []):
        caption = f"{row.get('run', '')}: loss over two filter-normalised directions, the same levels for all runs."
        every = [path for _, path in with_arrays]
        charts.append(Chart(f"surface-{i}", caption, partial(_draw_surface, row, path, every)))
    with_line = [(row, path) for row, path in with_arrays if len(_read_arrays(path).get("line_loss", ()))]
    if with_line:
        caption = "Loss on the line through the starting weights (0) and the trained ones (1)."
        charts.append(Chart("line", caption, partial(_draw_lines, with_line)))
    return charts


def _arrays_path(row: Row) -> Path:
    # The name alone: a result does not say where else to read.
    return result.RESULTS / "landscape" / Path(str(row["arrays"])).name


def _read_arrays(path: Path) -> dict[str, NDArray[np.float64]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name], dtype=float) for name in ARRAYS if name in arrays.files}


def _draw_surface(row: Row, path: Path, every: Sequence[Path]) -> Figure:
    from matplotlib.colors import LogNorm

    levels = shared_levels([_read_arrays(other)["loss"] for other in every])
    arrays = _read_arrays(path)
    loss = np.where(np.isfinite(arrays["loss"]), arrays["loss"], np.nan).T  # contours have x along the columns
    figure, axes = new_axes(3.9)
    axes.grid(False)
    filled = axes.contourf(
        arrays["a"],
        arrays["b"],
        np.maximum(loss, levels[0]),
        levels,
        norm=LogNorm(levels[0], levels[-1]),
        cmap="viridis",
    )
    filled.set_rasterized(True)
    axes.contour(arrays["a"], arrays["b"], loss, levels[1:-1:2], colors="white", linewidths=0.6)
    axes.plot(0, 0, "+", color=RED, markersize=9)
    axes.set_aspect("equal")
    axes.set_title(_name_of(row))
    bar = figure.colorbar(filled, ax=axes, ticks=levels[::3], format="%.3g", shrink=0.85)
    bar.ax.minorticks_off()
    bar.set_label("cross-entropy")
    return figure


def _draw_lines(rows: Sequence[tuple[Row, Path]]) -> Figure:
    figure, axes = new_axes(3.3 + 0.2 * len(rows))
    for i, (row, path) in enumerate(rows):
        arrays = _read_arrays(path)
        t = arrays.get("t", np.arange(len(arrays["line_loss"])))
        axes.plot(t, arrays["line_loss"], color=COLOURS[i % 7], label=_name_of(row))
    axes.set_xlabel("t: 0 starting weights, 1 trained weights")
    axes.set_ylabel("cross-entropy")
    figure.legend(loc="outside lower center")
    return figure


def _name_of(row: Row) -> str:
    """Of a run, short."""
    words = [short_backbone(row.get("backbone") or ""), str(row.get("head") or "").upper()]
    words += [
        f"{word} {row[key]}" for key, word in (("batch_size", "batch"), ("seed", "seed")) if row.get(key) is not None
    ]
    return plain(", ".join(word for word in words if word))
