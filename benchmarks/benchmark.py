"""What a benchmark is to the command line and to the report: one record, made by its module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Columns, Document, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.pages import Result


@dataclass(frozen=True)
class Chart:
    """A figure of the report: name (of its file, "" for the result's own), what it shows in a sentence, its drawing."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, or another command of `python -m benchmarks`.

    Attributes:
        name: of the command, and of the folder of its results.
        title: what it measures, in a line: the command's help and the heading in the report.
        arguments: a dataclass. Its docstring is the --help of the command, the text below each field that of the
            option; a field with `metadata={"positional": True}` is an argument without a name, a list one or more.
        run: gets an instance of `arguments`, and with `takes_recipe` a `Recipe`. Returns the path of the result, which
            the command line then says with its headline, or None.
        columns: of the table of the rows. None: one for each of their keys.
        headline: a result in a sentence; "" where its rows lack what the sentence is about.
        charts: the figures of a result, as far as its rows have what they show.
        tables: the tables of the rows, in place of one with `columns`.
        takes_recipe: whether the command also takes a recipe's arguments.
        pictured: whether the charts are in RESULTS.md too, as PNG files beside the result.
        write_page: writes a page of a result of its own beside it, where the result has what that shows.
    """

    name: str
    title: str
    arguments: type
    run: Callable[..., Path | None]
    columns: Columns | None = None
    headline: Callable[[Document], str] = lambda document: ""
    charts: Callable[[Document], list[Chart]] = lambda document: []
    tables: Callable[[Document], list[Table]] | None = None
    takes_recipe: bool = False
    pictured: bool = False
    write_page: Callable[[Result], Path | None] | None = None

    def say_headline(self, document: Document) -> str:
        """The headline, or the number of rows where there is none."""
        number = len(document.get("rows") or [])
        return self.headline(document) or f"{number} row{'s' * (number != 1)}"


def no_result(*_: Any) -> None:
    """The `run` of a command that only the report knows."""
