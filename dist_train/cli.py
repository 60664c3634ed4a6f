"""The command `dist-train`: train, lr, recipes, doctor, evaluate, predict, grid, export."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.config import Recipe
from dist_train.errors import UseError, WorkError, run_command, written
from dist_train.files import write_atomically
from dist_train.image_folder import with_shard_set
from dist_train.output import keep_stdout, say
from dist_train.parse import RECIPES, expanded, find_recipe, own_recipes, parse_recipe, parse_training, recipe_from_run
from dist_train.recipe import check, ranks_of_this_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dist-train`. Returns the exit status: 0 done, 1 the work failed, 2 wrong use.

    arguments: None for those of this process, which then keeps its standard output for results.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _main(words, keep_stdout if arguments is None else lambda: None))


def _main(words: list[str], keep: Callable[[], None]) -> int:
    # --help goes to standard output: it is asked for before that is kept.
    if words[:1] == ["train"]:
        run_training(words[1:], keep)
        return 0
    if words[:1] == ["lr"]:
        _range_test(words[1:], keep)
        return 0
    if words[:1] == ["doctor"]:
        hostfile, recipe, resume = _doctors_arguments(words[1:])
        keep()
        from dist_train.cluster.doctor import examine  # imports torch, which takes seconds

        return examine(recipe, resume, hostfile)
    options = _command_parser().parse_args(words)
    keep()
    return _run(options)


def run_training(arguments: list[str], begin: Callable[[], None] = lambda: None) -> None:
    """Train by a recipe; also what launch/train.py runs on every rank. begin: called when the arguments are read."""
    asked = parse_training(arguments)
    begin()
    check(asked.recipe, ranks_of_this_job(), resume=asked.resume)  # importing what follows takes seconds
    recipe = with_shard_set(asked.recipe)
    if asked.dry_run:
        from dist_train.train.dry_run import dry_run

        dry_run(recipe, asked.price_per_hour)
    else:
        from dist_train.train.loop import train  # which checks again, with the set

        train(recipe, asked.resume)


def _range_test(words: list[str], keep: Callable[[], None]) -> None:
    """`dist-train lr [RECIPE] ...`: other arguments are the recipe's, as for train."""
    parser = argparse.ArgumentParser(
        prog="dist-train lr",
        allow_abbrev=False,
        usage="%(prog)s [RECIPE.yaml] [--low RATE] [--high RATE] [--steps N] [--output FILE.csv] [--section.key VALUE]",
        description="Learning-rate range test: train from the starting weights while the rate rises from step to step, "
        "until the loss diverges. Suggests an optim.lr.",
        epilog="Other arguments are the recipe's, as for train.",
    )
    parser.add_argument("--low", type=_positive, default=1e-6, help="rate of the first step (default: %(default)s)")
    parser.add_argument("--high", type=_positive, default=1.0, help="rate of the last (default: %(default)s)")
    parser.add_argument("--steps", type=_number, default=100, help="steps at most (default: %(default)s)")
    table = "table to write, with a picture of the same name beside it (default: the run folder's name + -lr.csv)"
    parser.add_argument("--output", type=Path, metavar="FILE.csv", help=table)
    words = ["--config", *words] if words and not words[0].startswith("-") else words
    options, rest = parser.parse_known_args(words)
    recipe, _ = parse_recipe(rest)
    keep()
    if options.low >= options.high or options.steps < 10:
        raise UseError("--low must be below --high, and --steps 10 or more")
    output = options.output or Path(f"{recipe.train.run}-lr.csv")
    if output.suffix != ".csv":
        raise UseError(f"--output {output}: name the file .csv")
    # What has been trained there already does not matter: nothing is written into the run folder.
    no_run = str(Path(recipe.train.run).parent / ".rehearsal")
    check(replace(recipe, train=replace(recipe.train, run=no_run)), 1)
    from dist_train.train.lr_range import range_test

    say(range_test(with_shard_set(recipe), options.low, options.high, options.steps, output))


def _doctors_arguments(words: list[str]) -> tuple[Path | None, Recipe, str]:
    parser = argparse.ArgumentParser(prog="dist-train doctor", epilog="Other arguments are the recipe's, as for train.")
    parser.add_argument("--hostfile", type=Path, help="hosts to ask, over ssh (default: this machine alone)")
    options, words = parser.parse_known_args(words)
    return options.hostfile, *parse_recipe(words)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def _path_or_url(text: str) -> str:
    return expanded("--shards", text)


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train by a recipe in one process (several: deepspeed launch/train.py)")

    commands.add_parser("lr", help="try out learning rates: a range test of a recipe, with a picture")

    recipes = commands.add_parser("recipes", help="the recipes that come along, for --config; or the text of one")
    recipes.add_argument("name", nargs="?", help="such as finetune/dinov2_small.yaml (default: list all)")

    commands.add_parser("doctor", help="say before a run what would fail in it, on every host of a hostfile")

    evaluate = commands.add_parser("evaluate", help="accuracy of a run on a split")
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument(
        "--shards", type=_path_or_url, help="another shard set of the same classes (default: the run's)"
    )
    evaluate.add_argument("--csv", type=Path, help="per-class table (default: RUN/evaluation_SPLIT.csv)")
    evaluate.add_argument("--batch-size", type=_number, help="samples of one pass (default: the run's)")

    predict = commands.add_parser("predict", help="classes of image files")
    predict.add_argument("run", type=Path, help="run folder")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument(
        "--tags",
        default="",
        help="tags of the images, for a model that reads them: separated by commas, else by blanks",
    )
    predict.add_argument("--top", type=_number, default=5, help="classes named for each image")

    grid = commands.add_parser("grid", help="a picture of predictions on a split, right and wrong")
    grid.add_argument("run", type=Path, help="run folder")
    grid.add_argument("--split", default="test")
    grid.add_argument("--shards", type=_path_or_url, help="another shard set of the same classes (default: the run's)")
    grid.add_argument("--output", type=Path, help="PNG file (default: RUN/predictions.png)")

    export = commands.add_parser("export", help="plain weights as safetensors, in timm's names")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("file", type=Path, help="FILE.safetensors")

    for command in (evaluate, predict, grid, export):
        command.add_argument(
            "--checkpoint",
            default="auto",
            metavar="best|last|STEP|FOLDER",
            help="which weights (default: the best on val, if val was evaluated and with no --ema, else the last)",
        )
        command.add_argument("--ema", action="store_true", help="the averaged weights of train.ema, not the raw ones")
    return parser


def _say_recipes(name: str | None) -> int:
    if name is None:
        for recipe in own_recipes():
            first = (RECIPES / recipe).read_text(encoding="utf-8").partition("\n")[0]
            say(f"{recipe:<32} {first.lstrip('# ')}")
        return 0
    path = find_recipe(name)
    if not path.is_file():
        raise UseError(f"recipes {name}: there is none of this name; `dist-train recipes` lists them")
    say(path.read_text(encoding="utf-8").rstrip("\n"))
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.command == "recipes":
        return _say_recipes(options.name)
    recipe = recipe_from_run(options.run)
    if options.command == "export" and options.file.suffix != ".safetensors":
        raise UseError(f"{options.file}: name the file .safetensors")
    # Importing torch and DALI takes seconds: what is wrong above is told before.
    from dist_train.use.evaluate import evaluate
    from dist_train.use.export import export
    from dist_train.use.grid import grid
    from dist_train.use.predict import predict
    from dist_train.use.trained import load_trained

    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    if options.command == "evaluate":
        return _say_evaluation(*evaluate(trained, options.split, options.shards, options.batch_size), options)
    if options.command == "predict":
        bad = 0
        for path, best in predict(trained, options.images, options.tags, options.top):
            if isinstance(best, WorkError):
                print(best, file=sys.stderr)
                bad = 1
            else:
                say(path, *(f"  {probability:.4f}  {name}" for name, probability in best))
        return bad
    if options.command == "grid":
        say(grid(trained, options.split, options.shards, options.output))
    else:
        say(export(trained, options.file))
    return 0


def _say_evaluation(figures: dict[str, Any], table: str, options: argparse.Namespace) -> int:
    """Print the figures, also where the table cannot be written: that is an error only if --csv asked for it."""
    path = options.csv or options.run / f"evaluation_{options.split}.csv"
    unwritten = None
    try:
        with written(path, "--csv FILE puts it elsewhere"):
            write_atomically(path, table.encode())
    except WorkError as error:
        unwritten = error
    say(json.dumps(figures | {"csv": None if unwritten else str(path)}, indent=1))
    if unwritten and options.csv:
        raise unwritten
    if unwritten:
        print(f"warning: {unwritten}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
