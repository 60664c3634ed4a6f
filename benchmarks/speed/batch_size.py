"""What a batch size costs and gains: step time, memory, time and money per epoch, and with training the accuracy.

Every point of the sweep (model, head, image size, global batch, micro-batch, and what runs the model) is measured by
`benchmarks/speed/step.py` in a process of its own. The result is written after each point, and the same command
continues where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Benchmark, Result
from benchmarks.charts import Chart
from benchmarks.pages import require_page
from benchmarks.speed.batch_charts import of_accuracies, over_batches
from benchmarks.speed.profile import advice, write_page
from benchmarks.speed.sweep import Arguments, measure_batch_sizes
from benchmarks.tables import Document, figures, having, rate, short_backbone, span, text_of
from dist_train.config import Recipe
from dist_train.errors import UseError
from dist_train.output import say


def run(arguments: Arguments, recipe: Recipe) -> Path:
    """Measure every point that is not yet in the result, train if asked to, and return the path of the result; with
    accuracies also say what they recommend, and write the page of it."""
    import torch

    most = max(1, torch.cuda.device_count())
    if arguments.jobs > most:
        raise UseError(f"--jobs {arguments.jobs}: points at the same time need a GPU each; use {most}")
    if arguments.seeds > 1 and not arguments.accuracy:
        raise UseError(f"--seeds {arguments.seeds}: a number of trainings, with --accuracy")
    if arguments.accuracy:
        require_page()
    path = measure_batch_sizes(recipe, arguments)
    if arguments.accuracy:
        one = Result(BENCHMARK, path, json.loads(path.read_bytes()))
        say("\n".join(advice(one.document)))
        if page := write_page(one):
            say(f"on one page: {page}")
    return path


def headline(document: Document) -> str:
    """The recommended batch, or the rates of all."""
    rows = document["rows"]
    for row in having([row for row in rows if row.get("recommended")], "batch_size", "images_per_s"):
        top1 = f", top-1 {row['top1']:.2%}" if having([row], "top1") else ""
        model = f"{short_backbone(row.get('backbone', ''))} {text_of(row.get('head')).upper()}"
        sure = f", in {row['recommended_share']:.0%} of resamples" if having([row], "recommended_share") else ""
        sure = sure or (", by one seed, which decides nothing" if top1 else "")
        return f"Recommended: {model}, batch {row['batch_size']:,}, {rate([row['images_per_s']])} images/s{top1}{sure}"
    rates, batches = figures(rows, "images_per_s"), figures(rows, "batch_size")
    return f"{rate(rates)} images/s at batches of {span(batches, ',')}" if rates and batches else ""


def charts(document: Document) -> list[Chart]:
    """Accuracy over the batch size and against the costs of training, throughput and memory over the batch size."""
    return of_accuracies(document["rows"]) + over_batches(document["rows"], "peak_mb")


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
    ("data_wait_share", "data wait", ".1%"),
    ("peak_mb", "peak MB", ",.0f"),
    ("device_mb", "whole GPU MB", ",.0f"),
    ("largest_micro_batch", "largest micro-batch", ",d"),
    ("epoch_minutes", "epoch minutes", ",.2f"),
    ("epoch_price", "epoch price", ",.4g"),
    ("joules_per_image", "J/image", ",.3g"),
    ("top1", "top-1", ".2%"),
    ("top1_error", "standard error", ".2%"),
    ("seeds", "seeds", "d"),
    ("train_minutes", "training minutes", ",.2f"),
    ("train_price", "training price", ",.4g"),
    ("train_wh", "training Wh", ",.4g"),
    ("pareto", "on the Pareto front", ""),
    ("recommended", "recommended", ""),
    ("recommended_share", "in resamples", ".0%"),
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
    write_page=write_page,
)
