"""Command-line arguments of the benchmarks that train many runs or look at trained ones."""

from __future__ import annotations

import argparse

from benchmarks.arguments import numbers
from dist_train.errors import UseError

COMPILE = ("none", "kernels", "graphs")  # values of model.compile that a sweep can compare


def add_sweeps(commands: argparse._SubParsersAction) -> None:
    """Add `batch_size`."""
    _add_batch_size(commands)


def _jobs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, a GPU each if there are any (%(default)s)"
    )


def _add_batch_size(commands: argparse._SubParsersAction) -> None:
    batch_size = commands.add_parser(
        "batch_size",
        help="what a batch size costs and gains",
        description="Step time, memory, time and money per epoch over batch sizes, models, heads and image sizes, with "
        "--accuracy also training to the end. Other arguments are a recipe, which every point shares, as `dist-train "
        "train` takes it (--config FILE --section.key value ...). Stopped, it goes on with the same command.",
    )
    batch_size.add_argument("--name", required=True, help="of the result: benchmarks/results/batch_size/NAME.json")
    batch_size.add_argument("--backbones", metavar="A,B", help="(default: the recipe's)")
    batch_size.add_argument("--heads", default="cls,ifa", metavar="A,B", help="(default: %(default)s)")
    batch_size.add_argument("--batches", default="16,32,64,128,256", metavar="A,B", help="(default: %(default)s)")
    batch_size.add_argument("--sizes", metavar="A,B", help="sides of the images, pixels (default: the recipe's)")
    batch_size.add_argument(
        "--arm", default="synthetic", choices=("synthetic", "end_to_end"), help="of `step` (default: %(default)s)"
    )
    batch_size.add_argument(
        "--compile",
        metavar="A,B",
        help="values of model.compile (default: none,graphs on a GPU, which shows what of a step is the host's; else "
        "none)",
    )
    batch_size.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="measure each batch accumulated from this many, too"
    )
    batch_size.add_argument(
        "--search", type=int, default=0, metavar="N", help="find the largest micro-batch that fits, up to N"
    )
    batch_size.add_argument("--memory-gb", type=float, default=0.0, metavar="GB", help="that a process may take")
    batch_size.add_argument("--price-per-hour", type=float, metavar="X", help="of the device, in any currency")
    batch_size.add_argument("--accuracy", action="store_true", help="train to the end at each batch size")
    batch_size.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="P",
        help="points of top-1 that the recommended, cheapest batch may be below the best (default: %(default)s)",
    )
    batch_size.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before (default: %(default)s)")
    batch_size.add_argument("--steps", type=int, default=10, metavar="N", help="steps measured (default: %(default)s)")
    _jobs_argument(batch_size)
    batch_size.set_defaults(command=_batch_size, takes_recipe=True)


def _batch_size(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.batch_size import Sweep, measure_batch_sizes
    from dist_train.cli import parse_recipe

    recipe, _ = parse_recipe(options.recipe_arguments)
    compile = (options.compile or ("none,graphs" if torch.cuda.is_available() else "none")).split(",")
    if unknown := set(compile) - set(COMPILE):
        raise UseError(f"--compile: no '{min(unknown)}'; there are {', '.join(COMPILE)}")
    sweep = Sweep(
        backbones=tuple((options.backbones or recipe.model.backbone).split(",")),
        heads=tuple(options.heads.split(",")),
        batches=tuple(numbers("--batches", options.batches)),
        sizes=tuple(numbers("--sizes", options.sizes)) if options.sizes else (recipe.data.image_size,),
        compile=tuple(compile),
        arm=options.arm,
        micro_batch=options.micro_batch,
        search=options.search,
        memory_gb=options.memory_gb,
        price_per_hour=options.price_per_hour,
        accuracy=options.accuracy,
        tolerance=options.tolerance,
        warmup=options.warmup,
        steps=options.steps,
    )
    from benchmarks.old import tell

    tell(measure_batch_sizes(recipe, sweep, options.jobs, options.name))
    return 0
