"""What the report shows of the study: a table of its configurations, and a figure for each of its experiments.

A configuration is everything that a run is but its head and seed. Accuracies are test top-1 in percent.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.charts import GREY, HEAD_COLOURS, HEAD_MARKERS, HEIGHT, Chart, batch_axis, legend, new_axes, plain
from benchmarks.claims.study_runs import BASE, Seeds, is_run, with_spread
from benchmarks.tables import Document, Row, Table, by, short_backbone, text_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What makes a configuration: key of a row, heading of the table.
FIELDS = {
    "data": "data",
    "backbone": "backbone",
    "image_size": "px",
    "text_tokens": "text tokens",
    "batch_size": "batch",
    "lr_scaling": "rate scaling",
    "budget": "equal",
    "head_init": "head starts",
}
# What each experiment asks, and the keys that it varies.
EXPERIMENTS = {
    "scaling": ("scaling the rate with the batch size, beside the fixed rate", ("batch_size", "lr_scaling")),
    "steps": ("equal steps, beside equal epochs", ("batch_size", "budget")),
    "init": ("how the heads start", ("batch_size", "head_init")),
    "text": ("text tokens", ("text_tokens",)),
    "patch": ("patches and image sizes", ("backbone", "image_size")),
}
WORDS = {"none": "fixed rate", "linear": "linear scaling", "sqrt": "square-root scaling", 0: "no text"}
UNITS = {
    "batch_size": "batch {}",
    "image_size": "{} px",
    "text_tokens": "{} tokens",
    "head_init": "{} start",
    "budget": "equal {}",
}
ByHead = dict[str, Seeds]


def finished(rows: Sequence[Row]) -> list[Row]:
    """Rows with an accuracy, a head and a seed."""
    return [row for row in rows if all(row.get(key) is not None for key in ("top1", "head", "seed"))]


def heads_of(rows: Sequence[Row]) -> list[str]:
    """The heads, CLS first."""
    return sorted({row["head"] for row in rows}, key=lambda head: (head != "cls", head))


def grouped(rows: Sequence[Row], keys: Collection[str]) -> dict[tuple[Any, ...], ByHead]:
    """Accuracies by what the rows have under the keys, and by head, in order of appearance."""
    found: dict[tuple[Any, ...], ByHead] = {}
    for row in rows:
        its = found.setdefault(tuple(row.get(key) for key in keys), {})
        its.setdefault(row["head"], Seeds())[row["seed"]] = 100 * row["top1"]
    return found


# ---------------------------------------------------------------------- the table
def summary_table(rows: Sequence[Row]) -> Table:
    """A row for each configuration: mean ± standard deviation of each head's top-1 in percent, and IFA minus CLS in
    points with its standard error over the seeds that both have."""
    rows = finished(rows)
    heads = heads_of(rows)
    shown = {key: head for key, head in FIELDS.items() if key == "data" or len({row.get(key) for row in rows}) > 1}
    both = {"cls", "ifa"} <= set(heads)
    headings = ["experiment", *shown.values(), *(f"{head.upper()} (seeds)" for head in heads)]
    headings += ["IFA - CLS, points (pairs)"] if both else []
    cells = []
    for configuration, by_head in grouped(rows, FIELDS).items():
        values = dict(zip(FIELDS, configuration, strict=True))
        its = [row for row in rows if all(row.get(key) == value for key, value in values.items())]
        line = [", ".join(by(its, "experiment")), *(text_of(values[key]) for key in shown)]
        for head in heads:
            seeds = by_head.get(head)
            line.append(f"{with_spread(seeds.mean, seeds.deviation, '.2f')} ({len(seeds)})" if seeds else "")
        if both:
            gain = by_head.get("ifa", Seeds()) - by_head.get("cls", Seeds())
            line.append(f"{with_spread(gain.mean, gain.error, '+.2f')} ({len(gain)})" if gain else "")
        cells.append(line)
    title = "Test top-1 in %, mean ± standard deviation over the seeds; IFA - CLS with its standard error"
    numeric = [i > len(shown) for i in range(len(headings))]
    return Table(title, ["experiment", *shown], headings, numeric, cells)


# ---------------------------------------------------------------------- the figures
def study_charts(document: Document) -> list[Chart]:
    """For each data set the accuracy over batch sizes, and each experiment beside the runs it is compared with."""
    charts = []
    rows = [row for row in finished(document["rows"]) if row.get("data") and row.get("batch_size")]
    for data, its in sorted(by(rows, "data").items()):
        slug = re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-").lower() or "data"
        over_batches = over_batch_sizes(its)
        if len(over_batches) > 1:
            caption = f"{data}: accuracy over the batch size at a fixed rate and number of epochs."
            charts.append(Chart(f"batch-{slug}", caption, partial(_draw, over_batches, over_batches=True)))
        for experiment, (asked, varied) in EXPERIMENTS.items():
            categories = comparison(its, experiment)
            if len(categories) > 1:
                batches = [row["batch_size"] for row in its if row.get("experiment") == experiment]
                at = "" if "batch_size" in varied else f", batch {min(batches)}"
                caption = f"{data}{at}: {asked}."
                charts.append(Chart(f"{experiment}-{slug}", caption, partial(_draw, categories, over_batches=False)))
    return charts


def over_batch_sizes(rows: Sequence[Row]) -> dict[int, ByHead]:
    """Accuracy by batch size and head, of the runs that are BASE in everything else."""
    found = grouped([row for row in rows if is_run(row)], ["batch_size"])
    return {batch: found[batch,] for (batch,) in sorted(found)}


def comparison(rows: Sequence[Row], experiment: str) -> dict[str, ByHead]:
    """The runs of an experiment beside those that it is compared with, smallest batch size and BASE first.

    The rate scaling is compared with the smallest batch size too, whose accuracy it is to regain.
    """
    own = [row for row in rows if row.get("experiment") == experiment]
    _, varied = EXPERIMENTS[experiment]
    batches = {row["batch_size"] for row in own}
    if experiment == "scaling":
        batches |= {min((row["batch_size"] for row in rows if row.get("experiment") == "batch"), default=0)}
    wanted = grouped(own, varied).keys() | {
        tuple((BASE | {"batch_size": batch})[key] for key in varied) for batch in batches
    }
    heads = heads_of(own)

    def is_compared(row: Row) -> bool:
        here = {key: row.get(key) for key in varied}
        same = row["head"] in heads and row["batch_size"] in batches and is_run(row, **here)
        return same and tuple(here.values()) in wanted

    def order(place: tuple[Any, ...]) -> list[tuple[bool, Any]]:
        pairs = zip(varied, place, strict=True)
        return [(isinstance(value, str) and value != BASE[key], value) for key, value in pairs]

    found = grouped([row for row in rows if is_compared(row)], varied) if own else {}
    return {_label(varied, place): found[place] for place in sorted(found, key=order)}


def _label(varied: Sequence[str], place: Sequence[Any]) -> str:
    words = [
        short_backbone(value) if key == "backbone" else WORDS.get(value) or UNITS.get(key, "{}").format(value)
        for key, value in zip(varied, place, strict=True)
    ]
    return ", ".join(words)


def _draw(categories: Mapping[Any, ByHead], over_batches: bool) -> Figure:
    """Mean and standard deviation of each head, and faintly its seeds: over batch sizes, or beside names."""
    heads = list(dict.fromkeys(head for by_head in categories.values() for head in by_head))
    figure, axes = new_axes(HEIGHT if over_batches else 0.5 * len(categories) + 1.1)
    for i, head in enumerate(heads):
        # A little apart, so that the bars of one place do not hide each other.
        apart = i - (len(heads) - 1) / 2
        its = {
            category * 2 ** (0.07 * apart) if over_batches else number + 0.17 * apart: by_head[head]
            for number, (category, by_head) in enumerate(categories.items())
            if head in by_head
        }
        colour, marker = HEAD_COLOURS.get(head, GREY), HEAD_MARKERS.get(head, "o")
        means, spreads = ([getattr(seeds, of) for seeds in its.values()] for of in ("mean", "deviation"))
        faint = [(place, value) for place, seeds in its.items() for value in seeds.values()]
        places, values = zip(*faint, strict=True)
        style: dict[str, Any] = {"color": colour, "marker": marker, "label": plain(head.upper()), "capsize": 3}
        faintly: dict[str, Any] = {"color": colour, "marker": marker, "alpha": 0.3, "linestyle": "none"}
        if over_batches:
            axes.errorbar(list(its), means, yerr=spreads, **style)
            axes.plot(places, values, **faintly)
        else:
            axes.errorbar(means, list(its), xerr=spreads, linestyle="none", **style)
            axes.plot(values, places, **faintly)
    if over_batches:
        batch_axis(axes, list(categories))
        axes.set_ylabel("test top-1, %")
    else:
        axes.set_yticks(range(len(categories)), [plain(label) for label in categories])
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_xlabel("test top-1, %")
    legend(figure, len(heads))
    return figure
