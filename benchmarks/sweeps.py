"""Command-line arguments of the benchmarks that train many runs or look at trained ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.arguments import numbers
from dist_train.errors import UseError
from dist_train.output import say

COMPILE = ("none", "kernels", "graphs")  # values of model.compile that a sweep can compare


def add_sweeps(commands: argparse._SubParsersAction) -> None:
    """Add `study`, `batch_size`, `paper` and `landscape`."""
    _add_batch_size(commands)
    _add_paper(commands)
    _add_landscape(commands)
    _add_study(commands)


def _jobs_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, a GPU each if there are any (%(default)s)"
    )


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study",
        help="the paper's claims as questions, on drawn characters and photos",
        description="Pretrain a small ViT on one cast of drawn characters, fine-tune it on another and on photos with "
        "several batch sizes, heads and seeds, and say what the runs answer. Stopped, it goes on.",
    )
    study.add_argument("--name", required=True, help="of the result: benchmarks/results/study/NAME.json")
    study.add_argument("--scratch", type=Path, default=Path("runs/study"), metavar="DIR", help="(%(default)s)")
    study.add_argument("--photos", type=Path, metavar="CSV", help="photos to fine-tune on, as `shards build` takes")
    study.add_argument("--class-column", default="class", metavar="NAME", help="of the CSV (default: %(default)s)")
    study.add_argument("--vocabulary", type=Path, metavar="FILE", help="WordPiece vocab.txt; without it no text")
    study.add_argument("--lr", default="0.01", metavar="RATE", help="or drawn=RATE,photos=RATE (default: %(default)s)")
    study.add_argument("--experiments", metavar="A,B", help="only these: batch, scaling, init, steps, patch, text")
    study.add_argument("--seeds", type=int, default=3, metavar="N", help="of each run (default: %(default)s)")
    study.add_argument("--batches", default="16,32,64,128,256", metavar="A,B", help="(default: %(default)s)")
    study.add_argument(
        "--epochs", default="drawn=4,photos=2", metavar="N", help="of fine-tuning (default: %(default)s)"
    )
    study.add_argument("--pictures", type=int, default=3200, help="of the cast to fine-tune on (default: %(default)s)")
    study.add_argument("--characters", type=int, default=40, help="of that cast (default: %(default)s)")
    study.add_argument("--pretraining-pictures", type=int, default=20000, metavar="N", help="(default: %(default)s)")
    study.add_argument("--pretraining-characters", type=int, default=200, metavar="N", help="(default: %(default)s)")
    study.add_argument("--pretraining-epochs", type=int, default=3, metavar="N", help="(default: %(default)s)")
    _jobs_argument(study)
    study.set_defaults(command=_study)


def _study(options: argparse.Namespace) -> int:
    from benchmarks.study import EXPERIMENTS, Study, per_data, run_study

    study = Study(
        scratch=options.scratch,
        photos=options.photos,
        class_column=options.class_column,
        vocabulary=options.vocabulary,
        rates=per_data("--lr", options.lr, float),
        epochs=per_data("--epochs", options.epochs, int),
        experiments=tuple(options.experiments.split(",")) if options.experiments else EXPERIMENTS,
        seeds=options.seeds,
        batches=tuple(sorted(numbers("--batches", options.batches))),
        characters=options.characters,
        pictures=options.pictures,
        pretraining_characters=options.pretraining_characters,
        pretraining_pictures=options.pretraining_pictures,
        pretraining_epochs=options.pretraining_epochs,
    )
    from benchmarks.old import tell

    tell(run_study(study, options.jobs, options.name))
    return 0


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


def _add_paper(commands: argparse._SubParsersAction) -> None:
    paper = commands.add_parser(
        "paper",
        help="a table of the paper, its numbers beside ours",
        description="Train the cells of a table by their recipes, or go on with them, and print the paper's number "
        "beside ours in each; blank where a cell was not run.",
    )
    paper.add_argument("--table", required=True, choices=("1", "2", "3", "4", "5", "6", "fig3"))
    paper.add_argument(
        "--name", help="of the result: benchmarks/results/paper/NAME.json (default: the table and scale)"
    )
    paper.add_argument(
        "--scale",
        default="full",
        choices=("full", "small"),
        help="small: tiny ViTs on drawn characters, to see that every recipe runs (default: %(default)s)",
    )
    paper.add_argument("--cells", metavar="A,B", help="run these cells only (default: all)")
    paper.add_argument("--render", action="store_true", help="run nothing, only print what is finished")
    paper.add_argument("--vocabulary", type=Path, metavar="FILE", help="WordPiece vocab.txt instead of the hub's")
    _jobs_argument(paper)
    paper.set_defaults(command=_paper)


def _paper(options: argparse.Namespace) -> int:
    from benchmarks.paper import run_table

    cells = options.cells.split(",") if options.cells else None
    name = options.name or f"{'' if options.table == 'fig3' else 'table'}{options.table}-{options.scale}"
    say(run_table(options.table, options.scale, cells, options.render, options.vocabulary, options.jobs, name))
    return 0


def _add_landscape(commands: argparse._SubParsersAction) -> None:
    landscape = commands.add_parser(
        "landscape",
        help="loss surfaces around trained weights",
        description="The loss over a plane of two filter-normalised random directions (Li et al. 2018) and on the line "
        "from the initial weights, the same directions and samples for all runs. Stopped, it goes on.",
    )
    landscape.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    landscape.add_argument("--name", required=True, help="of the result: benchmarks/results/landscape/NAME.json")
    landscape.add_argument("--split", default="test", help="(default: %(default)s)")
    landscape.add_argument("--samples", type=int, default=256, help="of the split (default: %(default)s)")
    landscape.add_argument("--points", type=int, default=21, metavar="N", help="a side of the plane (%(default)s)")
    landscape.add_argument("--radius", type=float, default=1.0, help="half of its side (default: %(default)s)")
    landscape.add_argument("--line-points", type=int, default=29, metavar="N", help="(default: %(default)s)")
    landscape.add_argument("--seed", type=int, default=0, help="of the directions (default: %(default)s)")
    landscape.set_defaults(command=_landscape)


def _landscape(options: argparse.Namespace) -> int:
    from benchmarks.landscape import measure_landscape
    from benchmarks.old import tell

    tell(
        measure_landscape(
            options.runs,
            options.split,
            options.samples,
            options.points,
            options.radius,
            options.line_points,
            options.seed,
            options.name,
        )
    )
    return 0
