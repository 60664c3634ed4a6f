"""The benchmarks that are not yet modules of their own: their command line and what the report needs of them."""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Benchmark, no_result
from benchmarks.sweeps import add_sweeps, numbers
from dist_train.errors import UseError
from dist_train.output import say

COMMANDS = (
    "histogram",
    "loader",
    "engine",
    "precision",
    "exchange",
    "step",
    "ifa",
    "kill",
    "study",
    "batch_size",
    "paper",
    "landscape",
)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of one benchmark, with the words that are a recipe's in `recipe_arguments`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What things cost and gain.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    _add_histogram(commands)
    _add_loader(commands)
    _add_engine(commands)
    _add_precision(commands)
    _add_exchange(commands)
    _add_step(commands)
    _add_ifa(commands)
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
    from benchmarks.old_charts import cost_charts
    from benchmarks.report_headlines import _HEADLINES, BENCHES
    from benchmarks.report_tables import COLUMNS, rows_tables

    def charts(name: str, document: dict[str, Any]) -> list[Any]:
        return cost_charts(name, document) + accuracy_charts(name, document)

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
            partial(charts, name),
            partial(rows_tables, name) if name in ("study", "gpu") else None,
            pictured=name in ("loader", "study", "batch_size"),
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


def _add_loader(commands: argparse._SubParsersAction) -> None:
    loader = commands.add_parser(
        "loader",
        help="data loaders side by side, ours and its peers",
        description="Images/s, processor time, memory and time to the first batch of data loaders on the same images.",
    )
    loader.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="PATH",
        help="a shard set, or a folder or CSV that `python -m shards build` takes",
    )
    loader.add_argument("--name", required=True, help="of the result: benchmarks/results/loader/NAME.json")
    loader.add_argument("--bake", type=int, metavar="S", help="build the shards resized to S x S (not for a shard set)")
    loader.add_argument("--max-side", type=int, metavar="N", help="build the shards with at most N pixels on a side")
    loader.add_argument("--size", type=int, default=128, help="side of a training image (default: %(default)s)")
    loader.add_argument("--margin", type=int, default=32, help="resize to size + margin (default: %(default)s)")
    loader.add_argument("--batch", type=int, default=64, help="images of a batch (default: %(default)s)")
    loader.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="threads, or worker processes (default: the cores of this machine, %(default)s)",
    )
    loader.add_argument("--rounds", type=int, default=7, metavar="N", help="of all loaders (default: %(default)s)")
    loader.add_argument("--seconds", type=float, default=4, metavar="T", help="of a run (default: %(default)s)")
    loader.add_argument("--only", metavar="A,B", help="these loaders only (names of modules in benchmarks/peers)")
    loader.add_argument(
        "--scratch", type=Path, default=Path("data/benchmark"), metavar="DIR", help="for converted images (%(default)s)"
    )
    loader.add_argument(
        "--check", action="store_true", help="fail if our loader's host work or first batch is above its limit"
    )
    loader.set_defaults(command=_loader)


def _loader(options: argparse.Namespace) -> int:
    from benchmarks.loader import CONTESTANTS, measure_loaders
    from benchmarks.peers import Task
    from dist_train.data.manifest import MANIFEST_NAME
    from shards.build import build_shard_set
    from shards.plan import BuildOptions
    from shards.sources import read_source

    names = options.only.split(",") if options.only else list(CONTESTANTS)
    if unknown := set(names) - set(CONTESTANTS):
        raise UseError(f"--only: no loader '{min(unknown)}'; there are {', '.join(CONTESTANTS)}")
    if options.check and "ours" not in names:
        raise UseError("--check is about this project's loader; add ours to --only")
    shards = options.images
    if not (shards / MANIFEST_NAME).exists():
        build = BuildOptions(size=options.bake, max_side=options.max_side, workers=options.threads)
        shards = options.scratch / options.name
        build_shard_set(read_source(options.images), shards, build)
    elif options.bake or options.max_side:
        raise UseError(f"{options.images} is a shard set; --bake and --max-side are for images that are not one yet")
    task = Task(str(shards), options.size, options.margin, options.batch, options.threads, str(options.scratch))
    tell(measure_loaders(task, names, options.rounds, options.seconds, options.name, options.check))
    return 0


def _add_engine(commands: argparse._SubParsersAction) -> None:
    engine = commands.add_parser(
        "engine",
        help="DeepSpeed's engine beside a bare PyTorch loop",
        description="Time of a training step through DeepSpeed against a bare loop on the same batch, in turns.",
    )
    engine.add_argument("--backbone", default="vit_base_patch16", help="(default: %(default)s)")
    engine.add_argument("--size", type=int, default=128, help="side of an image (default: %(default)s)")
    engine.add_argument("--stages", default="0,1,2,3", metavar="A,B", help="ZeRO stages (default: %(default)s)")
    engine.add_argument("--micro-batches", default="8,16,32,64", metavar="A,B", help="(default: %(default)s)")
    engine.add_argument("--pairs", type=int, default=3, metavar="N", help="turns at least (default: %(default)s)")
    engine.add_argument(
        "--seconds", type=float, default=60, metavar="T", help="more turns up to this time (%(default)s)"
    )
    engine.add_argument(
        "--arm",
        default="model",
        choices=("model", "settings", "host"),
        help="model: the backbone beside a bare loop and DeepSpeed's defaults; settings: our settings turned back, one "
        "at a time; host: the host's time for a step, with a model too small to compute (default: %(default)s)",
    )
    engine.add_argument("--name", required=True, help="of the result: benchmarks/results/engine/NAME.json")
    engine.set_defaults(command=_engine)


def _engine(options: argparse.Namespace) -> int:
    from benchmarks.engine import measure_engine

    stages = numbers("--stages", options.stages)
    micro_batches = numbers("--micro-batches", options.micro_batches)
    tell(
        measure_engine(
            options.backbone,
            options.size,
            stages,
            micro_batches,
            options.pairs,
            options.seconds,
            options.arm,
            options.name,
        )
    )
    return 0


def _add_exchange(commands: argparse._SubParsersAction) -> None:
    exchange = commands.add_parser(
        "exchange",
        help="what of the gradients' exchange is hidden behind the computing",
        description="Steps of two ranks in two network namespaces, whose cable is as slow as makes the exchange of a "
        "step take as long as its computing: ours beside torch's DDP and DeepSpeed, in turns. Needs root.",
    )
    exchange.add_argument("--backbone", default="vit_small_patch16", help="(default: %(default)s)")
    exchange.add_argument("--size", type=int, default=64, help="side of an image (default: %(default)s)")
    exchange.add_argument("--micro-batch", type=int, default=16, metavar="N", help="of a rank (default: %(default)s)")
    exchange.add_argument("--turns", type=int, default=15, metavar="N", help="of all (default: %(default)s)")
    exchange.add_argument(
        "--set",
        default="stages",
        choices=("stages", "buckets", "settings"),
        help="beside DDP: ours and DeepSpeed's stages; ours with other buckets; ZeRO with other settings "
        "(default: %(default)s)",
    )
    exchange.add_argument("--stages", default="0,1,2,3", metavar="A,B", help="ZeRO stages (default: %(default)s)")
    exchange.add_argument("--name", required=True, help="of the result: benchmarks/results/exchange/NAME.json")
    exchange.set_defaults(command=_exchange)


def _exchange(options: argparse.Namespace) -> int:
    from benchmarks.exchange import measure_exchange

    tell(
        measure_exchange(
            options.backbone,
            options.size,
            options.micro_batch,
            options.turns,
            options.set,
            numbers("--stages", options.stages),
            options.name,
        )
    )
    return 0


def _add_step(commands: argparse._SubParsersAction) -> None:
    step = commands.add_parser(
        "step",
        help="what one training step of a recipe costs",
        description="Time, throughput, data wait, memory, FLOPs and MFU of one point: a recipe, as `dist-train train` "
        "takes it (--config FILE --section.key value ...), on one device.",
    )
    step.add_argument(
        "--arms", default="synthetic", metavar="A,B", help="synthetic, loader, end_to_end (default: %(default)s)"
    )
    step.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before (default: %(default)s)")
    step.add_argument("--steps", type=int, default=30, metavar="N", help="steps measured (default: %(default)s)")
    step.add_argument("--name", required=True, help="of the result: benchmarks/results/step/NAME.json")
    step.set_defaults(command=_step, takes_recipe=True)


def _step(options: argparse.Namespace) -> int:
    from benchmarks.step import ARMS, measure_steps
    from dist_train.cli import parse_recipe

    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        raise UseError(f"--arms: no arm '{min(unknown)}'; there are {', '.join(ARMS)}")
    recipe, _ = parse_recipe(options.recipe_arguments)
    tell(measure_steps(recipe, arms, options.warmup, options.steps, options.name))
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


def _add_ifa(commands: argparse._SubParsersAction) -> None:
    ifa = commands.add_parser(
        "ifa",
        help="what the IFA head costs over the CLS head",
        description="Time and peak memory of a training step with the CLS head, our IFA head, and IFA as the reference "
        "computes it (all tokens of all blocks stacked), in turns.",
    )
    ifa.add_argument("--backbones", default="vit_base_patch16", metavar="A,B", help="(default: %(default)s)")
    ifa.add_argument("--text-tokens", default="0", metavar="A,B", help="(default: %(default)s)")
    ifa.add_argument("--batch", type=int, default=16, help="(default: %(default)s)")
    ifa.add_argument("--size", type=int, default=128, help="side of an image (default: %(default)s)")
    ifa.add_argument("--classes", type=int, default=3263, help="(default: DAF's %(default)s)")
    ifa.add_argument("--pairs", type=int, default=10, metavar="N", help="turns (default: %(default)s)")
    ifa.add_argument("--precision", default="float32", choices=("float32", "bf16", "bf16_autocast"))
    ifa.add_argument("--name", required=True, help="of the result: benchmarks/results/ifa/NAME.json")
    ifa.set_defaults(command=_ifa)


def _ifa(options: argparse.Namespace) -> int:
    from benchmarks.ifa import measure_ifa

    tokens = numbers("--text-tokens", options.text_tokens)
    tell(
        measure_ifa(
            options.backbones.split(","),
            tokens,
            options.batch,
            options.size,
            options.classes,
            options.pairs,
            options.precision,
            options.name,
        )
    )
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
