"""The command `dist-train`: train, doctor, evaluate, predict, export; and how a recipe is read."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from dist_train.config import Recipe
from dist_train.errors import UseError, run_command

SECTIONS: dict[str, type] = {section.name: section.default_factory for section in fields(Recipe)}
KNOWN_KEYS = [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in fields(kind)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dist-train`. Returns the exit status: 0 done, 1 the work failed, 2 wrong use."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"]:
        return run_command(lambda: run_training(arguments[1:]))
    if arguments[:1] == ["doctor"]:
        return run_command(lambda: _run_doctor(arguments[1:]))
    options = _command_parser().parse_args(arguments)
    return run_command(lambda: _run(options))


def run_training(arguments: list[str]) -> None:
    """Train by a recipe; also what launch/train.py runs on every rank."""
    recipe, resume = parse_recipe(arguments)
    from dist_train.train.loop import train  # after the recipe is known to be good: importing takes seconds

    train(recipe, resume)


def parse_recipe(arguments: list[str]) -> tuple[Recipe, str]:
    """Read `--config FILE [--section.key value ...] [--resume auto|none|FOLDER]`; later ones win.

    Raises UseError for an unknown key, naming the nearest known one, and for a value of the wrong kind.
    """
    parser = _recipe_parser()
    _check_keys(arguments)
    try:
        parsed = parser.parse_args(arguments)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UseError(" ".join(str(error).split())) from None
    return _recipe(parsed.as_dict()), parsed.resume


def _recipe_parser() -> jsonargparse.ArgumentParser:
    # The meaning of a key is the text below it in its section; --help prints it.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="dist-train train", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a recipe; may be given several times")
    parser.add_argument(
        "--resume", default="none", help="auto (the newest checkpoint of the run), none, a step, or a folder"
    )
    # The deepspeed launcher hands every rank its number this way; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    return parser


def _recipe(values: dict[str, Any]) -> Recipe:
    return Recipe(**{section: _build(kind, values[section]) for section, kind in SECTIONS.items()})


def recipe_from_run(run: Path) -> Recipe:
    """The resolved recipe of a run folder. Raises UseError where there is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UseError(f"{run}: no run here (no recipe.yaml)")
    document = _read_recipe_file(path)
    if isinstance(document.get("model", {}).get("compile"), bool):  # of runs before there was more than on and off
        document["model"]["compile"] = "kernels" if document["model"]["compile"] else "none"
    try:
        return _recipe(_recipe_parser().parse_object(document).as_dict())
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UseError(f"{path}: {' '.join(str(error).split())}") from None


def _run_doctor(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="dist-train doctor", epilog="Other arguments are the recipe's, as for train.")
    parser.add_argument("--hostfile", type=Path, help="hosts to ask, over ssh (default: this machine alone)")
    options, words = parser.parse_known_args(arguments)
    recipe, _ = parse_recipe(words)
    from dist_train.doctor import examine

    return examine(recipe, options.hostfile)


def _build(kind: type, values: dict[str, Any]) -> Any:
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _check_keys(arguments: list[str]) -> None:
    """Raise UseError for keys that no recipe has, in the files named by --config and on the command line."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            _check_key(name[2:], "the command line")
        if name == "--config":
            _read_recipe_file(Path(value or (arguments[i + 1] if i + 1 < len(arguments) else "")))


def _read_recipe_file(path: Path) -> dict[str, Any]:
    """The document in a recipe file. Raises UseError where it is none, or has keys that no recipe has."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UseError(f"--config {path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UseError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise UseError(f"{path}: not a recipe, which has the sections {', '.join(SECTIONS)}")
    for section, entries in document.items():
        if section not in SECTIONS:
            nearest = difflib.get_close_matches(str(section), SECTIONS, 1, 0) or list(SECTIONS)
            raise UseError(f"{path}: unknown section '{section}'; the nearest known one is '{nearest[0]}'")
        for key in entries or {}:
            _check_key(f"{section}.{key}", str(path))
    return document


def _check_key(key: str, where: str) -> None:
    if key not in KNOWN_KEYS:
        nearest = difflib.get_close_matches(key, KNOWN_KEYS, 1, 0)[0]
        raise UseError(f"{where}: unknown recipe key '{key}'; the nearest known one is '{nearest}'")


def _command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train by a recipe in one process (several: deepspeed launch/train.py)")

    commands.add_parser("doctor", help="say before a run what would fail in it, on every host of a hostfile")

    evaluate = commands.add_parser("evaluate", help="accuracy of a run on a split")
    evaluate.add_argument("run", type=Path, help="run folder")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--shards", help="another shard set of the same classes (default: the run's)")
    evaluate.add_argument("--csv", type=Path, help="per-class table (default: RUN/evaluation_SPLIT.csv)")
    evaluate.add_argument("--batch-size", type=int, help="samples of one pass (default: the run's)")

    predict = commands.add_parser("predict", help="classes of image files")
    predict.add_argument("run", type=Path, help="run folder")
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    predict.add_argument(
        "--tags",
        default="",
        help="tags of the images, for a model that reads them: separated by commas, else by blanks",
    )
    predict.add_argument("--top", type=int, default=5, help="classes named for each image")

    grid = commands.add_parser("grid", help="a picture of predictions on a split, right and wrong")
    grid.add_argument("run", type=Path, help="run folder")
    grid.add_argument("--split", default="test")
    grid.add_argument("--shards", help="another shard set of the same classes (default: the run's)")
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


def _run(options: argparse.Namespace) -> int:
    from dist_train import inference  # importing torch and DALI takes seconds; --help need not wait

    recipe = recipe_from_run(options.run)
    if options.command == "evaluate":
        return inference.run_evaluate(options, recipe)
    if options.command == "predict":
        return inference.run_predict(options, recipe)
    if options.command == "grid":
        return inference.run_grid(options, recipe)
    return inference.run_export(options, recipe)


if __name__ == "__main__":
    sys.exit(main())
