"""The command `dist-train`: train, lr, recipes, doctor, models, evaluate, predict, grid, export, demo."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dist_train import __version__
from dist_train.config import Recipe
from dist_train.errors import Parser, UseError, WorkError, run_command, written
from dist_train.files import write_atomically
from dist_train.image_folder import with_shard_set
from dist_train.machine import is_installed
from dist_train.output import keep_stdout, say
from dist_train.parse import RECIPES, expanded, find_recipe, own_recipes, parse_recipe, parse_training, recipe_from_run
from dist_train.recipe import check, ranks_of_this_job
from dist_train.use.formats import check_target, export_as

if TYPE_CHECKING:
    from dist_train.use.predict import Prediction
    from dist_train.use.trained import TrainedModel


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
    if options.command == "models":
        from dist_train.models.listing import list_models  # imports torch and timm

        for line in list_models(options.pattern):
            say(line)
        return 0
    return _run(options)


def run_training(arguments: list[str], begin: Callable[[], None] = lambda: None) -> None:
    """Train by a recipe; also what launch/train.py runs on every rank. begin: called when the arguments are read."""
    asked = parse_training(arguments)
    begin()
    check(asked.recipe, ranks_of_this_job(), resume=asked.resume)  # importing what follows takes seconds
    recipe = with_shard_set(asked.recipe)
    if asked.dry_run:
        from dist_train.train.dry_run import dry_run

        dry_run(recipe, asked.price_per_hour, asked.resume)
    else:
        from dist_train.train.loop import train  # which checks again, with the set

        train(recipe, asked.resume)


def _range_test(words: list[str], keep: Callable[[], None]) -> None:
    """`dist-train lr [RECIPE] ...`: other arguments are the recipe's, as for train."""
    parser = Parser(
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
    recipe, resume = parse_recipe(rest)
    keep()
    if resume != "none":
        raise UseError("--resume: a range test begins with the recipe's weights; model.weights takes those of a run")
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
    parser = Parser(prog="dist-train doctor", epilog="Other arguments are the recipe's, as for train.")
    parser.add_argument("--hostfile", type=Path, help="hosts to ask, over ssh (default: this machine alone)")
    options, words = parser.parse_known_args(words)
    return options.hostfile, *parse_recipe(words)


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!r}")
    return int(text)


def _threshold(text: str) -> str:
    try:
        if text == "best" or 0 <= float(text) <= 1:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be best or a probability from 0 to 1, not {text!r}")


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
    parser = Parser(prog="dist-train", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dist-train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train by a recipe in one process (several: deepspeed launch/train.py)")

    commands.add_parser("lr", help="try out learning rates: a range test of a recipe, with a picture")

    recipes = commands.add_parser("recipes", help="the recipes that come along, for --config; or the text of one")
    recipes.add_argument("name", nargs="?", help="such as finetune/dinov2_small.yaml (default: list all)")

    commands.add_parser("doctor", help="say before a run what would fail in it, on every host of a hostfile")

    models = commands.add_parser("models", help="the backbones there are: size, and whether IFA and text go with each")
    models.add_argument(
        "pattern",
        nargs="?",
        metavar="PATTERN",
        help="part of a name, or with wildcards, as '*dinov2*'; each that fits is looked at, about a second each "
        "(default: the paper's, and timm's families)",
    )
    _add_uses_of_a_run(commands)
    return parser


def _add_uses_of_a_run(commands: Any) -> None:
    """The commands that take a run folder. commands: argparse's subparsers."""
    of_a_run, of_a_split = argparse.ArgumentParser(add_help=False), argparse.ArgumentParser(add_help=False)
    of_a_run.add_argument("run", type=Path, help="run folder")
    of_a_run.add_argument(
        "--checkpoint",
        default="auto",
        metavar="best|last|STEP|FOLDER",
        help="which weights (default: the best on val, if val was evaluated and with no --ema, else the last)",
    )
    of_a_run.add_argument("--ema", action="store_true", help="the averaged weights of train.ema, not the raw ones")
    of_a_split.add_argument("--split", default="test")
    of_a_split.add_argument(
        "--shards", type=_path_or_url, help="another shard set of the same classes (default: the run's)"
    )

    def add(name: str, text: str, *more: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, parents=[of_a_run, *more])

    evaluate = add("evaluate", "accuracy of a run on a split, or how well it finds tags", of_a_split)
    evaluate.add_argument(
        "--csv",
        type=Path,
        help="per-class or per-tag table (default: RUN/evaluation_SPLIT.csv, with _CHECKPOINT, _ema and _SET where "
        "they are asked for); for classes the confusion matrix, its picture and the most confused pairs are beside it",
    )
    evaluate.add_argument("--batch-size", type=_number, help="samples of one pass (default: the run's)")

    predict = add("predict", "classes of image files")
    predict.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of them, with all folders below"
    )
    predict.add_argument(
        "--tags",
        default="",
        help="tags of the images, for a model that reads them: separated by commas, else by blanks",
    )
    predict.add_argument(
        "--tags-from-sidecars",
        action="store_true",
        help="the tags of photo.jpg are in photo.txt or photo.tags beside it, for a model that reads them",
    )
    predict.add_argument("--top", type=_number, default=5, help="classes named for each image")
    predict.add_argument(
        "--threshold",
        type=_threshold,
        metavar="0.5|best",
        help="instead of the --top, all tags at or above this probability, or above each tag's own that was chosen on "
        "val; for a run with data.labels tags",
    )
    predict.add_argument("--csv", type=Path, help="write a table of all images to this file instead of printing them")
    predict.add_argument(
        "--batch-size", type=_number, default=32, help="images decoded and computed together (default: 32)"
    )

    grid = add("grid", "a picture of predictions on a split, right and wrong", of_a_split)
    grid.add_argument("--output", type=Path, help="PNG file (default: RUN/predictions.png)")

    export = add("export", "the model for other programs: ONNX, timm's hub format, plain weights")
    export.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE.onnx|FILE.safetensors|FOLDER",
        help="ONNX with preprocessing and classes inside; plain weights in timm's names; or a new folder in the format "
        "that timm loads by local-dir:FOLDER, with a model card",
    )
    export.add_argument("--hub", metavar="USER/NAME", help="upload that folder to the Hugging Face hub, as private")
    export.add_argument("--public", action="store_true", help="what --hub makes is public")
    export.add_argument("--licence", help="of the model, for its card, as the hub names it: apache-2.0, cc-by-nc-4.0")

    demo = add("demo", "a page in the browser: predictions, and where the model looks")
    demo.add_argument("--port", type=_number, default=7860)
    demo.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: everyone's (default: this machine alone)"
    )


def _say_recipes(name: str | None) -> int:
    if name is None:
        for recipe in own_recipes():
            first = (RECIPES / recipe).read_text(encoding="utf-8").partition("\n")[0]
            say(f"{recipe:<34} {first.lstrip('# ')}")
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
    if options.command == "export":
        _check_export(options)
    if options.command == "demo" and not is_installed("gradio"):
        raise UseError("demo: needs gradio; pip install 'dist-train[page]'")
    # Importing torch and DALI takes seconds: what is wrong above is told before.
    from dist_train.use.evaluate import evaluate
    from dist_train.use.grid import grid
    from dist_train.use.trained import load_trained

    trained = load_trained(options.run, recipe, options.checkpoint, options.ema)
    if options.command == "evaluate":
        return _say_evaluation(*evaluate(trained, options.split, options.shards, options.batch_size), options)
    if options.command == "predict":
        return _say_predictions(trained, options)
    if options.command == "grid":
        say(grid(trained, options.split, options.shards, options.output))
    elif options.command == "demo":
        from dist_train.use.page import serve

        page = serve(trained, options.port, options.host)
        say(f"http://{options.host}:{options.port}")
        page.block_thread()
    else:
        _export(trained, options)
    return 0


def _say_predictions(trained: TrainedModel, options: argparse.Namespace) -> int:
    """Print the predictions, or write them to --csv. Returns 1 where an image has none, which is said on stderr."""
    from tqdm import tqdm

    from dist_train.use.pictures import pictures
    from dist_train.use.predict import predict, write_csv

    asked = pictures(options.images)
    top = min(options.top, len(trained.class_names))
    answers = predict(
        trained,
        asked,
        options.tags,
        top,
        threshold=options.threshold,
        tags_from_sidecars=options.tags_from_sidecars,
        batch_size=options.batch_size,
    )

    def naming_failures(predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        for prediction in predictions:
            if prediction.error is not None:
                tqdm.write(prediction.error, file=sys.stderr)
            yield prediction

    if options.csv is not None:
        bar = tqdm(answers, total=len(asked), unit=" images", disable=None, file=sys.stderr)
        failed = write_csv(naming_failures(bar), options.csv, None if options.threshold else top)
        print(
            f"{options.csv}: {len(asked):,} images{f', {failed:,} of them failed' if failed else ''}", file=sys.stderr
        )
        return int(failed > 0)
    failed = 0
    for prediction in naming_failures(answers):
        failed += prediction.error is not None
        pairs = zip(prediction.probabilities, prediction.names, strict=True)
        if prediction.error is None:
            say(prediction.path, *(f"  {probability:.4f}  {name}" for probability, name in pairs))
    return int(failed > 0)


def _check_export(options: argparse.Namespace) -> None:
    file = options.file
    if file is None and options.hub is None:
        raise UseError("export: name FILE.onnx, FILE.safetensors or a new FOLDER, or --hub USER/NAME")
    if file is not None:
        check_target(file)
    if options.public and options.hub is None:
        raise UseError("--public: is said of --hub USER/NAME")
    if options.licence and options.hub is None and (file is None or (file.suffix and not file.is_dir())):
        raise UseError("--licence: is written into a folder's model card; name a FOLDER or --hub USER/NAME")


def _export(trained: TrainedModel, options: argparse.Namespace) -> None:
    if options.file is not None:
        say(export_as(trained, options.file, options.licence))
    if options.hub is not None:
        from dist_train.use.hub_folder import push_to_hub

        say(push_to_hub(trained, options.hub, options.licence, options.public))


def _name_of_evaluation(options: argparse.Namespace) -> str:
    """With other weights or another set than the run's own its files have names of their own."""
    parts = ["evaluation", options.split]
    if options.checkpoint != "auto":
        parts.append(Path(options.checkpoint).name)
    if options.ema:
        parts.append("ema")
    if options.shards:
        parts.append(Path(urlsplit(options.shards).path).absolute().name)
    return "_".join(parts)


def _say_evaluation(figures: dict[str, Any], files: dict[str, bytes], options: argparse.Namespace) -> int:
    """Print the figures, also where the files cannot be written: that is an error only if --csv asked for them."""
    table = options.csv or options.run / f"{_name_of_evaluation(options)}.csv"
    unwritten = None
    paths = {}
    try:
        for ending, content in files.items():
            path = table if ending == ".csv" else table.with_name(table.stem + ending)
            with written(path, "--csv FILE puts it elsewhere"):
                write_atomically(path, content)
            paths[ending] = str(path)
    except WorkError as error:
        unwritten = error
    names = {".csv": "csv", "_confusion.csv": "confusion", "_confusion.png": "picture", "_confused.html": "confused"}
    say(json.dumps(figures | {name: paths.get(ending) for ending, name in names.items()}, indent=1))
    if unwritten and options.csv:
        raise unwritten
    if unwritten:
        print(f"warning: {unwritten}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
