"""How a recipe is read: YAML files and the command line in, a `Recipe` out, each mistake answered in one line.

Nothing here imports torch: a misspelt key is told at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonargparse

from dist_train.config import SECTIONS, Recipe, recipe_from_dict, recipe_to_dict
from dist_train.errors import UseError
from dist_train.ranges import check_ranges
from dist_train.synonyms import advice_for_key, advice_for_section
from dist_train.yaml_text import read_yaml

_FIELDS = {f"{section}.{field.name}": field for section, kind in SECTIONS.items() for field in fields(kind)}
KNOWN_KEYS = list(_FIELDS)
PATH_KEYS = (
    *("data.shards", "data.cache", "data.feature_cache", "data.tokenizer"),
    *("model.weights", "train.run", "deepspeed.config"),
)
"""Keys whose value may be a path or a URL: `~` and `$NAME` in it are expanded."""
RECIPES = Path(__file__).parent / "recipes"
"""The recipes that come along: launch/recipes of the checkout, by a link."""

_TEXT_KEYS = [key for key, field in _FIELDS.items() if field.type in ("str", "str | None")]
_OPTIONAL_KEYS = [key for key, field in _FIELDS.items() if field.type == "str | None"]
_VARIABLE = re.compile(r"\$(\$|[A-Za-z_]\w*|\{[^}]*\}?)")
_ALONE = ("-h", "--help", "--dry-run")
_WITH_VALUE = ("--config", "--resume", "--local_rank", "--price-per-hour")


@dataclass(frozen=True)
class Training:
    """What `dist-train train` is asked for. price_per_hour: of all machines of the run together."""

    recipe: Recipe
    resume: str = "none"
    dry_run: bool = False
    price_per_hour: float | None = None


def parse_recipe(arguments: list[str]) -> tuple[Recipe, str]:
    """Read `--config FILE [--section.key value ...] [--resume auto|none|FOLDER]`; later ones win.

    Raises UseError for an unknown key, naming what was probably meant, a repeated one, and a value of the wrong kind
    or outside of its range. Paths come back with `~` and variables expanded.
    """
    asked = parse_training(arguments)
    if asked.dry_run:
        raise UseError("the command line: --dry-run belongs to the training")
    return asked.recipe, asked.resume


def parse_training(arguments: list[str]) -> Training:
    """The same, and what belongs to the training alone: `[--dry-run [--price-per-hour PRICE]]`."""
    parser = recipe_parser()
    parts = []
    for name, value in _options(arguments):
        if name == "--config":
            path = find_recipe(value)
            parts.append(_typed(parser.parse_object, _expanded_document(_read_recipe_file(path), str(path)), str(path)))
        else:
            words = [name if name in _ALONE else f"{name}={value}"]
            parts.append(_typed(parser.parse_args, words, "the command line"))
    own = {key: part[key] for part in parts for key in ("resume", "dry_run", "price_per_hour") if key in part}
    asked = Training(_merged(parts), **own)
    price = asked.price_per_hour
    if price is not None and not (asked.dry_run and 0 <= price < math.inf):
        raise UseError(f"the command line: --price-per-hour {price} must be 0 or more, and belongs to --dry-run")
    return asked


def _merged(parts: Iterable[dict[str, Any]]) -> Recipe:
    """The recipe of what is given in several places, of which the later ones win. Raises UseError for numbers that
    cannot be."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for part in parts:
        for section in values:
            values[section] |= part.get(section, {})
    recipe = recipe_from_dict(values)
    check_ranges(recipe)
    return recipe


def find_recipe(name: str) -> Path:
    """The recipe file of that path; where there is none, that of this name among those that come along."""
    path = Path(name)
    if (path.exists() and not path.is_dir()) or path.is_absolute():  # a pipe, too
        return path
    own = [RECIPES / name, RECIPES / f"{name}.yaml"]
    return next((file for file in own if file.is_file()), path)


def own_recipes() -> list[str]:
    """Names of the recipes that come along, for --config."""
    files = sorted(RECIPES.rglob("*.yaml")) if RECIPES.is_dir() else []
    return [str(file.relative_to(RECIPES)) for file in files if file.name != "rows.yaml"]  # of the paper's, no recipe


def recipe_from_python(
    recipe: str | os.PathLike[str] | Recipe | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> Recipe:
    """A recipe as Python gives it, with the same checks and messages as `parse_recipe`.

    recipe: a file or a name as for --config, a recipe, a mapping, or None for the defaults. A mapping, and the
    overrides, have values by section ({"train": {"epochs": 1}}) or by dotted keys ({"train.epochs": 1}).
    """
    parser = recipe_parser()
    if isinstance(recipe, Recipe):
        where, document = "the recipe", recipe_to_dict(recipe)
    elif isinstance(recipe, str | os.PathLike):
        path = find_recipe(expanded("the recipe", os.fspath(recipe)))
        where, document = str(path), _read_recipe_file(path)
    else:
        where, document = "the recipe", _document_of("the recipe", recipe or {})
    given = (where, document), ("the call", _document_of("the call", overrides))
    return _merged(
        _typed(parser.parse_object, _expanded_document(entries, source), source) for source, entries in given
    )


def recipe_from_run(run: Path) -> Recipe:
    """The resolved recipe of a run folder. Raises UseError where there is none."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UseError(f"{run}: no run here (no recipe.yaml)")
    document = _read_recipe_file(path)
    if isinstance(document.get("model", {}).get("compile"), bool):  # of runs before there was more than on and off
        document["model"]["compile"] = "kernels" if document["model"]["compile"] else "none"
    values = _typed(recipe_parser().parse_object, document, str(path))
    return recipe_from_dict({section: values.get(section, {}) for section in SECTIONS})


def recipe_parser() -> jsonargparse.ArgumentParser:
    """The parser of a recipe's arguments; what it says of a key is the text below the key in its section."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="dist-train train", exit_on_error=False)
    parser.add_argument(
        "--config",
        action="config",
        help="a recipe: a file, or a name of `dist-train recipes`; may be given several times",
    )
    parser.add_argument(
        "--resume", default="none", help="auto (the newest checkpoint of the run), none, a step, or a folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="make a few steps, say what memory, time and money the run will take, and leave nothing behind",
    )
    parser.add_argument("--price-per-hour", type=float, help="with --dry-run: of all machines of the run together")
    # The deepspeed launcher hands every rank its number this way; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
    return parser


# ---------------------------------------------------------------- the command line
def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value, paths expanded. Raises UseError for unknown ones."""
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if word in _ALONE:
            yield word, ""
            continue
        if not name.startswith("--"):
            hint = f"; a recipe is given as --config {word}" if word.endswith((".yaml", ".yml")) else ""
            raise UseError(f"the command line: {word!r} belongs to no option{hint}")
        key = name[2:]
        if "." in key:
            _check_key(key, "the command line")
        elif key in SECTIONS:
            raise UseError(
                f"the command line: {name} is a section; give its keys, as --{key}.KEY VALUE, or --config FILE"
            )
        elif name not in _WITH_VALUE:
            raise _unknown_option(name)
        if not equals:
            following = next(words, None)
            if following is None:
                raise UseError(f"the command line: {name} needs a value")
            value = following
        if key in PATH_KEYS or name in ("--config", "--resume"):
            value = expanded(name, value)
        yield name, "null" if key in _OPTIONAL_KEYS and value.lower() in ("none", "null") else value


def expanded(what: str, text: str) -> str:
    """A path or URL with `~`, `~USER`, `$NAME` and `${NAME}` replaced; `$$` is a dollar.

    Raises UseError, naming `what` and the variable, where one is not set or is empty.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if name == "$":
            return "$"
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or (match[1][0] == "{") != (match[1][-1] == "}"):
            raise UseError(
                f"{what} {text}: {match[0]} cannot be expanded; write $NAME or ${{NAME}}, or $$ for a dollar"
            )
        if not os.environ.get(name):
            raise UseError(f"{what} {text}: the variable {name} is not set, or empty; set it, or write $$ for a dollar")
        return os.environ[name]

    if not text.strip():
        raise UseError(f"{what} is empty; give a path, or leave it out")
    path = os.path.expanduser(_VARIABLE.sub(value, text))
    if re.match(r"~\w*(/|$)", path):
        raise UseError(f"{what} {text}: no home folder is known for {path.partition('/')[0]}; write the whole path")
    return path


def _unknown_option(name: str) -> UseError:
    """Of the command's few own options a slip is likelier than of a key that stands without its section."""
    if name in _ALONE:
        return UseError(f"the command line: {name} takes no value; write {name} alone, or leave it out")
    own = difflib.get_close_matches(name.lower().replace("_", "-"), (*_ALONE, *_WITH_VALUE), n=1, cutoff=0.85)
    advice = f"did you mean {own[0]}?" if own else advice_for_key(name[2:], KNOWN_KEYS)
    return UseError(f"the command line: unknown option '{name}'{f'; {advice}' if advice else ''}")


def _check_key(key: str, where: str) -> None:
    if key not in KNOWN_KEYS:
        advice = advice_for_key(key, KNOWN_KEYS)
        raise UseError(f"{where}: unknown recipe key '{key}'{f'; {advice}' if advice else ''}")


# ---------------------------------------------------------------- files
def _read_recipe_file(path: Path) -> dict[str, dict[str, Any]]:
    """The document in a recipe file. Raises UseError where it is none, repeats a key or has one that no recipe has."""
    try:
        document = read_yaml(path, _TEXT_KEYS)
    except OSError as error:
        hint = "" if path.exists() else "; `dist-train recipes` lists those that come along"
        raise UseError(f"--config {path}: cannot be read ({error.strerror}){hint}") from None
    document = {} if document is None else document
    if not isinstance(document, dict):
        raise UseError(f"{path}: not a recipe, which has the sections {', '.join(SECTIONS)}")
    return _checked_document(document, str(path))


def _checked_document(document: dict[Any, Any], where: str) -> dict[str, dict[str, Any]]:
    """The sections that have keys. Raises UseError for what no recipe has."""
    for section, entries in document.items():
        if section not in SECTIONS:
            advice = advice_for_section(str(section), SECTIONS, KNOWN_KEYS)
            raise UseError(f"{where}: unknown section '{section}'; {advice or 'there are ' + ', '.join(SECTIONS)}")
        if not isinstance(entries, dict | None):
            raise UseError(f"{where}: '{section}' is a section, whose keys stand below it, and not {entries!r}")
        for key, value in (entries or {}).items():
            _check_key(f"{section}.{key}", where)
            _check_plain(f"{section}.{key}", value, where)
    return {section: entries for section, entries in document.items() if entries}


def _document_of(where: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What Python gives, by section or by dotted keys, as the document of a file would be. Raises UseError."""
    document: dict[Any, Any] = {}
    for name, value in given.items():
        section, dot, key = str(name).partition(".")
        if dot:
            entries = {key: value}
        elif isinstance(value, Mapping):
            entries = dict(value)
        else:
            document[section] = value  # which is told below
            continue
        kept = document.setdefault(section, {})
        for key, value in entries.items():
            if key in kept:
                raise UseError(f"{where}: {section}.{key} is given twice; keep one")
            kept[key] = _as_in_a_file(f"{section}.{key}", value)
    return _checked_document(document, where)


def _as_in_a_file(key: str, value: Any) -> Any:
    """A value of Python as YAML has it: paths are text, tuples lists, numbers of NumPy numbers."""
    if isinstance(value, list | tuple):
        return [_as_in_a_file(key, entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and key in _TEXT_KEYS else value


def _check_plain(key: str, value: Any, where: str) -> None:
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, float) and not math.isfinite(entry):
            raise UseError(f"{where}: {key} is {entry}; it must be a finite number")
        if not isinstance(entry, str | int | float | None):
            raise UseError(f"{where}: {key} is {type(entry).__name__} {entry}; it must be a text, a number or a list")


def _expanded_document(document: dict[str, dict[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    def value(key: str, written: Any) -> Any:
        if key in _OPTIONAL_KEYS and isinstance(written, str) and written.lower() in ("none", "null"):
            return None
        return expanded(f"{where}: {key}", written) if key in PATH_KEYS and isinstance(written, str) else written

    return {
        section: {key: value(f"{section}.{key}", written) for key, written in entries.items()}
        for section, entries in document.items()
    }


# ---------------------------------------------------------------- values
def _typed(parse: Callable[..., jsonargparse.Namespace], given: Any, where: str) -> dict[str, Any]:
    """What is given, each value in its key's type. Raises UseError for one of a wrong kind."""
    try:
        return parse(given, defaults=False).as_dict()
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UseError(f"{where}: {_line(error)}") from None


def _line(error: Exception) -> str:
    """What jsonargparse says of a value, in the words of a recipe."""
    text = " ".join(str(error).split())
    text = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"a <class '(\w+)'>", r"\1", text)
    text = re.sub(r"\ba tuple with (\d) elements", r"a list of \1 numbers", text)
    text = re.sub(r"<class 'tuple'>|\btuple\b", "list in brackets, as [0.1,0.2]", text)
    several = re.match(
        r"([\w.]+): Does not validate against any .* Errors: - (.*?) Given value type: .*?value: ?(.*)", text
    )
    if several is None:
        return text
    expected = " or ".join(part.removeprefix("Expected ").rstrip(". ") for part in several[2].split(" - "))
    return f"{several[1]}: Expected {expected}. Got value: {several[3]}"
