"""What a batch size costs and gains: step time, memory, time and money per epoch, and with training the accuracy.

Every point of the sweep (model, head, image size, global batch, micro-batch, and what runs the model) is measured by
`benchmarks/speed/step.py` in a process of its own. The result is written after each point, and the same command
continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from benchmarks.arguments import check_words, numbers, words
from benchmarks.benchmark import Benchmark, Chart
from benchmarks.charts import COLOURS, GREY, MARKERS, RED, legend, lines, new_axes, plain
from benchmarks.speed.batch_charts import over_batches, points_of, series_of
from benchmarks.speed.sweep import Sweep, measure_batch_sizes
from benchmarks.tables import Document, Row, figures, having, rate, short_backbone, span, text_of
from dist_train.config import Compile, Head, Recipe
from dist_train.errors import UseError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPILE = ("none", "kernels", "graphs")  # values of model.compile that a sweep can compare


@dataclass(frozen=True)
class Arguments:
    """Step time, memory, time and money per epoch over batch sizes, models, heads and image sizes, with --accuracy also
    training to the end. Every point shares the recipe. If it is stopped, the same command continues."""

    name: str
    """of the result: benchmarks/results/batch_size/NAME.json"""
    backbones: str | None = None
    """names separated by commas (the recipe's by default)"""
    heads: str = "cls,ifa"
    """of cls,ifa"""
    batches: str = "16,32,64,128,256"
    """global batch sizes"""
    sizes: str | None = None
    """sides of the images, pixels (the recipe's by default)"""
    arm: Literal["synthetic", "end_to_end"] = "synthetic"
    """of the benchmark step"""
    compile: str | None = None
    """values of model.compile; by default none,graphs on a GPU, which shows what of a step is the host's, else none"""
    micro_batch: int = 0
    """measure each batch accumulated from this many, too"""
    search: int = 0
    """find the largest micro-batch that fits, up to this many"""
    memory_gb: float = 0.0
    """that a process may take"""
    price_per_hour: float | None = None
    """of the device, in any currency"""
    accuracy: bool = False
    """train to the end at each batch size"""
    tolerance: float = 1.0
    """points of top-1 that the recommended, cheapest batch may be below the best"""
    warmup: int = 2
    """steps before those that are measured"""
    steps: int = 10
    """steps measured"""
    jobs: int = 1
    """runs at a time, a GPU each if there are any"""


def run(arguments: Arguments, recipe: Recipe) -> Path:
    """Measure every point that is not yet in the result, train if asked to, and return the path of the result."""
    import torch

    gpus = torch.cuda.device_count()
    compile = words(arguments.compile or ("none,graphs" if gpus else "none"))
    check_words("--compile", "", compile, COMPILE)
    heads = words(arguments.heads)
    check_words("--heads", "head", heads, get_args(Head))
    sweep = Sweep(
        backbones=tuple(words(arguments.backbones or recipe.model.backbone)),
        heads=tuple(cast(list[Head], heads)),
        batches=tuple(numbers("--batches", arguments.batches)),
        sizes=tuple(numbers("--sizes", arguments.sizes)) if arguments.sizes else (recipe.data.image_size,),
        compile=tuple(cast(list[Compile], compile)),
        arm=arguments.arm,
        micro_batch=arguments.micro_batch,
        search=arguments.search,
        memory_gb=arguments.memory_gb,
        price_per_hour=arguments.price_per_hour,
        accuracy=arguments.accuracy,
        tolerance=arguments.tolerance,
        warmup=arguments.warmup,
        steps=arguments.steps,
    )
    jobs = arguments.jobs
    if jobs > max(1, gpus):
        raise UseError(f"--jobs {jobs}: points at the same time need a GPU each, here are {gpus}; use {max(1, gpus)}")
    return measure_batch_sizes(recipe, sweep, jobs, arguments.name)


def headline(document: Document) -> str:
    """The recommended batch, or the rates of all."""
    rows = document["rows"]
    for row in having([row for row in rows if row.get("recommended")], "batch_size", "images_per_s"):
        top1 = f", top-1 {row['top1']:.2%}" if having([row], "top1") else ""
        model = f"{short_backbone(row.get('backbone', ''))} {text_of(row.get('head')).upper()}"
        return f"Recommended: {model}, batch {row['batch_size']:,}, {rate([row['images_per_s']])} images/s{top1}"
    rates, batches = figures(rows, "images_per_s"), figures(rows, "batch_size")
    return f"{rate(rates)} images/s at batches of {span(batches, ',')}" if rates and batches else ""


def charts(document: Document) -> list[Chart]:
    """Throughput, memory and accuracy over the batch size, and accuracy against the cost of training."""
    rows = document["rows"]
    found = over_batches(rows, "peak_mb")
    trained = having(rows, "batch_size", "top1")
    if len({row["batch_size"] for row in trained}) > 1:
        draw = partial(lines, points_of(trained, "top1", 100, by_way=False), "test top-1, %", zero=False)
        found.append(Chart("accuracy", "Test top-1 over the batch size, by head.", draw))
    cost = "train_price" if having(trained, "train_price") == trained else "train_minutes"
    if cheap := cheapest(having(trained, cost), cost):
        caption = (
            "Accuracy against the cost of training: filled points are on the Pareto front, a ring marks what is "
            "recommended, numbers are batch sizes."
        )
        found.append(Chart("pareto", caption, partial(_draw_pareto, cheap, cost)))
    return found


def cheapest(rows: Sequence[Row], cost: str) -> list[Row]:
    """One row for each batch size of each line: the way a batch is computed changes what a training costs, not what it
    learns."""
    best: dict[tuple[str, int], Row] = {}
    for name, its in series_of(rows, by_way=False).items():
        for row in its:
            point = (name, row["batch_size"])
            if point not in best or row[cost] < best[point][cost]:
                best[point] = row
    return list(best.values())


def _draw_pareto(rows: Sequence[Row], cost: str) -> Figure:
    series = series_of(rows, by_way=False)
    figure, axes = new_axes()
    for i, (name, its) in enumerate(series.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for row in its:
            at = (row[cost], 100 * row["top1"])
            fill = style["color"] if row.get("pareto") else "white"
            label = plain(name) if row is its[0] else None
            axes.plot(*at, markerfacecolor=fill, linestyle="none", label=label, **style)
            axes.annotate(f"{row['batch_size']:,}", at, xytext=(5, 4), textcoords="offset points")
            if row.get("recommended"):
                axes.plot(*at, "o", markersize=15, markerfacecolor="none", color=RED)
    if front := sorted((row[cost], 100 * row["top1"]) for row in rows if row.get("pareto")):
        axes.step(*zip(*front, strict=True), where="post", color=GREY, linewidth=1, zorder=1)
    axes.set_xlabel("price of a training" if cost == "train_price" else "minutes of a training")
    axes.set_ylabel("test top-1, %")
    axes.margins(0.1)
    legend(figure, len(series))
    return figure


COLUMNS = [
    ("backbone", "backbone", ""),
    ("head", "head", ""),
    ("image_size", "px", "d"),
    ("text_tokens", "text tokens", "d"),
    ("batch_size", "batch", ",d"),
    ("micro_batch", "micro-batch", ",d"),
    ("accumulation", "accumulation", "d"),
    ("compile", "compiled", ""),
    ("precision", "precision", ""),
    ("step_ms", "step ms", ",.1f"),
    ("images_per_s", "images/s", ",.1f"),
    ("peak_mb", "peak MB", ",.0f"),
    ("largest_micro_batch", "largest micro-batch", ",d"),
    ("epoch_minutes", "epoch minutes", ",.2f"),
    ("epoch_price", "epoch price", ",.4g"),
    ("top1", "top-1", ".2%"),
    ("train_minutes", "training minutes", ",.2f"),
    ("train_price", "training price", ",.4g"),
    ("pareto", "on the Pareto front", ""),
    ("recommended", "recommended", ""),
    ("trained_at", "trained at", ""),
]
BENCHMARK = Benchmark(
    "batch_size",
    "What a batch size costs and gains",
    Arguments,
    run,
    COLUMNS,
    headline,
    charts,
    takes_recipe=True,
    pictured=True,
)
