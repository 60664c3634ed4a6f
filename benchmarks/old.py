"""The benchmarks that are not yet modules of their own: their command line and what the report needs of them."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Benchmark, no_result
from benchmarks.sweeps import add_sweeps
from dist_train.output import say

COMMANDS = (
    "histogram",
    "precision",
    "kill",
    "study",
    "paper",
    "landscape",
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of one benchmark, with the words that are a recipe's in `recipe_arguments`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What things cost and gain.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    _add_histogram(commands)
    _add_precision(commands)
    _add_kill(commands)
    add_sweeps(commands)
    options, recipe_arguments = parser.parse_known_args(arguments)
    if recipe_arguments and not getattr(options, "takes_recipe", False):
        parser.error(f"unrecognized arguments: {' '.join(recipe_arguments)}")
    options.recipe_arguments = recipe_arguments
    return options


def benchmarks() -> tuple[Benchmark, ...]:
    """What the report needs of each of them."""
    from benchmarks.charts_accuracy import accuracy_charts
    from benchmarks.report_headlines import _HEADLINES, BENCHES
    from benchmarks.report_tables import COLUMNS, rows_tables

    def headline(name: str, document: dict[str, Any]) -> str:
        return _HEADLINES[name](document, document.get("rows") or [])

    return tuple(
        Benchmark(
            name,
            title,
            object,
            no_result,
            COLUMNS.get(name),
            partial(headline, name),
            partial(accuracy_charts, name),
            partial(rows_tables, name) if name == "study" else None,
            pictured=name == "study",
        )
        for name, title in BENCHES.items()
    )


def tell(path: Path) -> None:
    """Say a result file in the report's sentence, and where it is."""
    known = {benchmark.name: benchmark for benchmark in benchmarks()}
    say(known[path.parent.name].say_headline(json.loads(path.read_bytes())), path)


def _add_histogram(commands: argparse._SubParsersAction) -> None:
    histogram = commands.add_parser("histogram", help="accuracy that colours alone give on a shard set")
    histogram.add_argument("set", type=Path, metavar="SET", help="folder of the shard set")
    histogram.set_defaults(command=_histogram)


def _histogram(options: argparse.Namespace) -> int:
    from benchmarks.colour_histogram import colour_histogram_accuracy

    accuracy, samples = colour_histogram_accuracy(options.set)
    say(f"{options.set}: logistic regression on colour histograms: test top-1 {accuracy:.4f} over {samples} samples")
    return 0


def _add_precision(commands: argparse._SubParsersAction) -> None:
    precision = commands.add_parser(
        "precision",
        help="what a precision costs in accuracy",
        description="Train a recipe, as `dist-train train` takes it (--config FILE --section.key value ...), to its "
        "end in several precisions with the same seeds, and compare test accuracies in pairs.",
    )
    precision.add_argument("--precisions", default="float32,bf16_autocast,bf16", metavar="A,B", help="(%(default)s)")
    precision.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    precision.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    precision.add_argument("--name", required=True, help="of the result: benchmarks/results/precision/NAME.json")
    precision.set_defaults(command=_precision, takes_recipe=True)


def _precision(options: argparse.Namespace) -> int:
    from benchmarks.precision import measure_precisions
    from dist_train.cli import parse_recipe

    recipe, _ = parse_recipe(options.recipe_arguments)
    tell(measure_precisions(recipe, options.precisions.split(","), options.seeds, options.jobs, options.name))
    return 0


def _add_kill(commands: argparse._SubParsersAction) -> None:
    kill = commands.add_parser(
        "kill",
        help="a run killed again and again beside an undisturbed one",
        description="Kill a tiny run with SIGKILL at random moments, resume it each time, and compare how it ends.",
    )
    kill.add_argument("--shards", type=Path, required=True, metavar="SET", help="with a train and a val split")
    kill.add_argument("--ranks", type=int, default=1, help="(default: %(default)s)")
    kill.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    kill.add_argument("--epochs", type=int, default=60, help="of the run, several a kill (default: %(default)s)")
    kill.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    kill.add_argument(
        "--scratch", type=Path, default=Path("runs/kill"), metavar="DIR", help="for the two runs (%(default)s)"
    )
    kill.add_argument("--name", required=True, help="of the result: benchmarks/results/kill/NAME.json")
    kill.set_defaults(command=_kill)


def _kill(options: argparse.Namespace) -> int:
    from benchmarks.kill import measure_kills

    tell(
        measure_kills(
            options.shards,
            options.ranks,
            options.kills,
            options.epochs,
            options.seed,
            options.scratch / f"{options.ranks}-ranks",
            options.name,
        )
    )
    return 0
