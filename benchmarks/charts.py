"""How the report draws: one style, and the shapes that several benchmarks' figures have.

This module is imported without matplotlib, which only drawing needs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.6, 3.5  # inches
STYLE: dict[Any, Any] = {
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
}
OURS, GREY, LIGHT, RED = "#0072b2", "#8a8a8a", "#d4d4d4", "#c02020"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAD_COLOURS = {
    **{"cls": "#0072b2", "ifa": "#d55e00", "stacked": "#8a8a8a"},
    **{"mean": "#009e73", "last_n": "#cc79a7", "all_layers": "#e69f00", "attentive": "#56b4e9"},
}
HEAD_MARKERS = {"cls": "o", "ifa": "s", "stacked": "^"}


@dataclass(frozen=True)
class Chart:
    """A figure of the report: name (of its file, "" for the result's own), what it shows in a sentence, its drawing."""

    name: str
    caption: str
    draw: Callable[[], Figure]


def png(chart: Chart, text_size: float = 10) -> bytes:
    """The figure as a PNG file, the same bytes each time. text_size: in points."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"font.size": text_size}):
        chart.draw().savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()


def new_axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the report's width with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def plain(text: Any) -> str:
    """Text in which matplotlib finds no formula."""
    return str(text).replace("$", r"\$")


def bars(
    names: Sequence[str],
    values: Sequence[float],
    label: str,
    *,
    form: str = ",.3g",
    colours: Sequence[str] | str = OURS,
    ranges: Sequence[tuple[float, float]] | None = None,
) -> Figure:
    """Horizontal bars from top to bottom with their values; ranges: the lowest and highest of each, as whiskers."""
    figure, axes = new_axes(0.36 * len(names) + 0.8)
    places = range(len(names))
    axes.barh(places, values, height=0.6, color=colours)
    for place, (low, high) in zip(places, ranges or (), strict=False):
        axes.plot([low, high], [place, place], color="#222222", linewidth=1.2, marker="|")
    reach = [high for _, high in ranges] if ranges else values
    for place, value, end in zip(places, values, reach, strict=True):
        axes.annotate(format(value, form), (max(end, 0), place), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [plain(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(False, axis="y")
    axes.set_xlabel(plain(label))
    return figure


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    *,
    crosses: Sequence[float] = (),
    zero: bool = True,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Lines over the batch size by name, points as (batch size, value). crosses: batch sizes that ran out of memory;
    zero: whether the axis of the values begins there; errors: of the points of each line, drawn as bars where any is
    not 0."""
    figure, axes = new_axes(HEIGHT + 0.2 * len(series))
    for i, (name, points) in enumerate(series.items()):
        x, y = zip(*points, strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, label=plain(name), color=colour, marker=marker)
        if errors and any(errors[name]):
            axes.errorbar(x, y, yerr=errors[name], fmt="none", ecolor=colour, elinewidth=1, capsize=3)
    for batch in sorted(set(crosses)):
        axes.plot(batch, 0.97, "x", color=RED, markersize=8, transform=axes.get_xaxis_transform())
    batch_axis(axes, [*(batch for points in series.values() for batch, _ in points), *crosses])
    axes.set_ylabel(plain(label))
    if zero:
        axes.set_ylim(0, 1.04 * axes.get_ylim()[1])  # points that are nearly alike would be at its edge
    legend(figure, len(series))
    return figure


def batch_axis(axes: Axes, batches: Sequence[float]) -> None:
    """A log2 axis with the batch sizes as its ticks."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(batches)), [f"{batch:,}" for batch in sorted(set(batches))])
    axes.minorticks_off()
    axes.set_xlabel("batch size")


def legend(figure: Figure, entries: int) -> None:
    """Below the axes, where there is something to tell apart."""
    if entries > 1:
        labels = [text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]]
        # Two long ones side by side are wider than the figure.
        figure.legend(loc="outside lower center", ncols=1 if any(len(text) > 20 for text in labels) else 2)
