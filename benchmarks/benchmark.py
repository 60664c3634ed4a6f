"""What a benchmark is to the command line and to the report, one record, made by its module; and what a result is."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.charts import Chart, png
from benchmarks.load import BUSY
from benchmarks.tables import FOLDED, Columns, Document, Table, table_of, text_of


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


@dataclass(frozen=True)
class Result:
    """A result file, what is in it, and the benchmark that made it."""

    benchmark: Benchmark
    path: Path
    document: Document

    @property
    def name(self) -> str:
        """`BENCHMARK: NAME`."""
        return f"{self.benchmark.name}: {self.path.stem}"

    @property
    def ident(self) -> str:
        """Of its section in the page."""
        return f"{slug(self.benchmark.name)}--{slug(self.path.stem)}"

    @property
    def link(self) -> str:
        """From the documents to the file."""
        return quote(f"results/{self.benchmark.name}/{self.path.name}")

    @property
    def headline(self) -> str:
        """In a sentence."""
        return self.benchmark.say_headline(self.document)

    @property
    def note(self) -> str:
        """What is to be known before its figures are read; "" if nothing."""
        return text_of((self.document.get("parameters") or {}).get("note"))

    @property
    def machine(self) -> str:
        """The hardware in one line, and whether it had other work meanwhile."""
        hardware = self.document.get("hardware") or {}
        cores, memory = text_of(hardware.get("cores")), text_of(hardware.get("memory_gb"))
        parts = [f"{cores} cores of {hardware.get('cpu', '')}" if cores else hardware.get("cpu", "")]
        parts += [f"{memory} GB"] if memory else []
        parts += hardware.get("gpus") or []
        taken = self.document.get("busy_elsewhere") or 0.0
        parts += [f"of which other processes took {taken:.0%} meanwhile"] if taken >= BUSY else []
        return ", ".join(str(part) for part in parts if part)

    @property
    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self.document.get("parameters") or {}, indent=1, ensure_ascii=False)

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages."""
        return {name: text_of(number) for name, number in (self.document.get("versions") or {}).items()}

    @cached_property
    def charts(self) -> list[Chart]:
        """Its figures."""
        return self.benchmark.charts(self.document)

    @cached_property
    def tables(self) -> list[Table]:
        """Its tables, in reading order."""
        return tables_of(self.benchmark, self.document)

    @property
    def pictures(self) -> list[tuple[Chart, Path]]:
        """The figures that RESULTS.md has too, with their files."""
        stem = self.path.stem
        charts = self.charts if self.benchmark.pictured else []
        return [(c, self.path.with_name(f"{stem}-{c.name}.png" if c.name else f"{stem}.png")) for c in charts]

    @property
    def page(self) -> str:
        """Link from the documents to the result's own page; "" where none has been written."""
        own = self.path.with_suffix(".html")
        return quote(f"results/{self.benchmark.name}/{own.name}") if own.exists() else ""

    def images(self, text_size: float = 10) -> Iterator[tuple[str, str]]:
        """Caption and data of each figure, for a page."""
        for chart in self.charts:
            yield chart.caption, base64.b64encode(png(chart, text_size)).decode()


def tables_of(benchmark: Benchmark, document: Document) -> list[Table]:
    """The tables of a result: the lists beside its rows, then the rows."""
    rows = document.get("rows") or []
    tables = []
    if answers := document.get("answers"):
        columns = [(key, key, "") for key in ("question", "verdict", "evidence")]
        tables.append(table_of("Questions and answers", columns, answers, first=True))
    for key, more in document.items():
        if key in ("rows", "answers") or not isinstance(more, list) or not more:
            continue
        if all(isinstance(row, dict) for row in more):
            tables.append(table_of(key.replace("_", " ").capitalize(), None, more))
    if benchmark.tables is not None:
        return tables + benchmark.tables(document)
    title, folded = (f"All {len(rows)} rows", len(rows) >= FOLDED) if tables else ("", False)
    return [*tables, table_of(title, benchmark.columns, rows, folded=folded)]


def slug(text: str) -> str:
    """Text as an id or class."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-") or "x"


def no_result(*_: Any) -> None:
    """The `run` of a command that only the report knows."""
