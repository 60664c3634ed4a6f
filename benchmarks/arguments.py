"""The command line of a benchmark, from the dataclass of its arguments; a recipe's words are left for `parse_recipe`.

Nothing here imports torch: --help and a misspelt option are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from benchmarks.benchmark import Benchmark
from dist_train.config import Recipe
from dist_train.errors import UseError
from dist_train.parse import parse_recipe
from dist_train.ranges import ranges_of

RECIPE = """Other arguments are a recipe, as `dist-train train` takes it: --config FILE --section.key value ... (its
--help names the keys)."""


@dataclass(frozen=True)
class Command:
    """A benchmark with what was asked of it. recipe_arguments: the words that are a recipe's."""

    benchmark: Benchmark
    arguments: Any
    recipe_arguments: list[str]

    @property
    def recipe(self) -> Recipe:
        """The recipe. Raises UseError as `parse_recipe` does."""
        return parse_recipe(self.recipe_arguments)[0]


def parse(benchmark: Benchmark, words: list[str]) -> Command:
    """What the words after the benchmark's name say. Raises UseError where they say nothing it knows, for a number
    outside of the range in the type of its field, and for a name in a folder, where the report would not find it."""
    parser = parser_of(benchmark)
    own, others = _divided(parser, words) if benchmark.takes_recipe else (words, [])
    _check_misspelt(benchmark, parser, others)
    try:
        parsed = parser.parse_args(own)
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UseError(f"benchmarks {benchmark.name}: {' '.join(str(error).split())}") from None
    asked = benchmark.arguments(**vars(parsed))
    for name, allowed in ranges_of(benchmark.arguments).items():
        value = getattr(asked, name)
        if value is not None and value not in allowed:
            raise UseError(f"benchmarks {benchmark.name}: --{name.replace('_', '-')} is {value}; it must be {allowed}")
    file = getattr(asked, "name", None)
    if file is not None and Path(file).name != (file or None):
        raise UseError(f"benchmarks {benchmark.name}: --name '{file}' is not the name of a file; leave the folder out")
    return Command(benchmark, asked, others)


def parser_of(benchmark: Benchmark) -> jsonargparse.ArgumentParser:
    """The parser of the benchmark's own arguments."""
    documented = docstring_parser.parse_from_object(benchmark.arguments)
    said = {parameter.arg_name: parameter.description or "" for parameter in documented.params}
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m benchmarks {benchmark.name}",
        description="\n\n".join(filter(None, (documented.short_description, documented.long_description))),
        epilog=RECIPE if benchmark.takes_recipe else None,
        exit_on_error=False,
    )
    kinds = get_type_hints(benchmark.arguments)
    for field in fields(benchmark.arguments):
        kind, about = kinds[field.name], said.get(field.name, "")
        if field.metadata.get("positional"):
            shown: dict[str, Any] = {"metavar": field.name.removesuffix("s").upper(), "help": about}
            if get_origin(kind) is list:
                kind, shown["nargs"] = get_args(kind)[0], "+"
            parser.add_argument(field.name, type=kind, **shown)
            continue
        option = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(option, action="store_true", help=about)
        elif field.default is MISSING:
            parser.add_argument(option, type=kind, required=True, help=about)
        else:
            parser.add_argument(option, type=kind, default=field.default, help=about)
    return parser


def _divided(parser: jsonargparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are the parser's, and the others."""
    takes_value = {option: action.nargs != 0 for action in parser._actions for option in action.option_strings}
    own: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name not in takes_value:
            others.append(word)
            continue
        own.append(word)
        if takes_value[name] and not equals:
            own += [value for value in [next(rest, None)] if value is not None]
    return own, others


def _check_misspelt(benchmark: Benchmark, parser: jsonargparse.ArgumentParser, others: list[str]) -> None:
    """Raise UseError where a word that is left for the recipe is nearly an option of the benchmark. The recipe's own
    options have a point in them, but for --config, which no benchmark's option is near to."""
    for word in others:
        option = word.partition("=")[0]
        if not option.startswith("--") or "." in option:
            continue
        if near := difflib.get_close_matches(option, parser._option_string_actions, n=1, cutoff=0.8):
            raise UseError(f"benchmarks {benchmark.name}: there is no option {option}; did you mean {near[0]}?")


def words(text: str) -> list[str]:
    """Words separated by commas, each once."""
    return list(dict.fromkeys(text.split(",")))


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Whole numbers separated by commas, each once. Raises UseError, naming the option, for others and lower ones."""
    try:
        found = [int(word) for word in words(text)]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise UseError(f"{option}: numbers from {least} on separated by commas are expected, not '{text}'")
    return list(dict.fromkeys(found))


def check_words(option: str, kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise UseError where one of the words asked for is not known. kind: what they name, or "" for a mere value."""
    if unknown := set(asked) - set(known):
        named = f"{kind} '{min(unknown)}'".strip()
        raise UseError(f"{option}: no {named}; there are {', '.join(known)}")


def positive_numbers(option: str, text: str) -> list[float]:
    """Numbers above 0, separated by commas. Raises UseError, naming the option."""
    try:
        found = [float(word) for word in words(text)]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found):
        raise UseError(f"{option}: numbers above 0 separated by commas are expected, not '{text}'")
    return found
