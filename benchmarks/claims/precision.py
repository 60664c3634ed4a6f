"""What a precision costs in accuracy: the same recipe trained to its end in each, with the same seeds.

Order, augmentation and initial weights of a seed are the same in every precision, so runs are compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast, get_args

from benchmarks.arguments import check_words, words
from benchmarks.benchmark import Benchmark
from benchmarks.claims.runs import finish_runs, outcome
from benchmarks.claims.study_runs import Seeds
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, having
from dist_train.config import Precision, Recipe
from dist_train.errors import UseError


@dataclass(frozen=True)
class Arguments:
    """Train a recipe to its end in several precisions with the same seeds, and compare test accuracies in pairs."""

    name: str
    """of the result: benchmarks/results/precision/NAME.json"""
    precisions: str = "float32,bf16_autocast,bf16"
    """separated by commas; the first is what the others are compared with"""
    seeds: int = 3
    """runs of each: seeds 0, 1, ..."""
    jobs: int = 1
    """runs at a time, a GPU each if there are any"""


def run(arguments: Arguments, base: Recipe) -> Path:
    """Train every precision with every seed. Writes the result after each run, and continues where it was stopped."""
    names = words(arguments.precisions)
    check_words("--precisions", "precision", names, get_args(Precision))
    precisions = cast(list[Precision], names)
    recipes = [
        replace(
            base,
            deepspeed=replace(base.deepspeed, precision=precision),
            train=replace(base.train, seed=seed, run=str(Path(base.train.run) / f"{precision}-seed{seed}")),
        )
        for seed in range(arguments.seeds)
        for precision in precisions
    ]
    parameters = {"recipe": asdict(base), "precisions": precisions, "seeds": arguments.seeds}
    rows: list[Row] = []
    path = None
    for recipe in finish_runs(recipes, arguments.jobs, "precision"):
        rows.append({"precision": recipe.deepspeed.precision, "seed": recipe.train.seed, **outcome(recipe)})
        rows.sort(key=lambda row: (precisions.index(row["precision"]), row["seed"]))
        more = {"differences": differences(rows, precisions)}
        path = write_result("precision", arguments.name, parameters, rows, more)
    if path is None:
        raise UseError(f"--seeds: {arguments.seeds} is not at least 1")
    return path


def differences(rows: list[Row], precisions: Sequence[str]) -> list[Row]:
    """Each precision's test accuracy less that of the first with the same seed, in points: mean and standard error."""
    first, *others = (
        Seeds({row["seed"]: 100 * row["top1"] for row in rows if row["precision"] == precision})
        for precision in precisions
    )
    found: list[Row] = []
    for precision, seeds in zip(precisions[1:], others, strict=True):
        if points := seeds - first:
            found.append(
                {
                    "precision": precision,
                    "compared_with": precisions[0],
                    "pairs": len(points),
                    "points": round(points.mean, 3),
                    "standard_error": None if math.isnan(points.error) else round(points.error, 3),
                }
            )
    return found


def headline(document: Document) -> str:
    """Each precision's distance from the first."""
    return ", ".join(
        f"{row['precision']} is {row['points']:+.2f} +- {row['standard_error']:.2f} points from {row['compared_with']}"
        for row in having(document.get("differences") or [], "points", "standard_error")
    )


BENCHMARK = Benchmark(
    "precision", "What a precision costs in accuracy", Arguments, run, headline=headline, takes_recipe=True
)
