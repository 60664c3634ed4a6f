"""All results as documents: `benchmarks/RESULTS.md` with its pictures, and the page `benchmarks/results.html`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks import result
from benchmarks.benchmark import Benchmark, Chart, no_result
from benchmarks.catalogue import BENCHMARKS
from benchmarks.charts import png
from benchmarks.tables import FOLDED, Document, Table, table_of, text_of
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically
from dist_train.output import say

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Arguments:
    """Write all results as a page, benchmarks/results.html, and as benchmarks/RESULTS.md."""


def run(_: Arguments) -> None:
    """Write the documents and say where."""
    say(write_report())


COMMAND = Benchmark("report", "all results as a page and as Markdown", Arguments, run)


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
        """The hardware in one line."""
        hardware = self.document.get("hardware") or {}
        cores, memory = text_of(hardware.get("cores")), text_of(hardware.get("memory_gb"))
        parts = [f"{cores} cores of {hardware.get('cpu', '')}" if cores else hardware.get("cpu", "")]
        parts += [f"{memory} GB"] if memory else []
        return ", ".join(str(part) for part in [*parts, *(hardware.get("gpus") or [])] if part)

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

    def images(self) -> Iterator[tuple[str, str]]:
        """Caption and data of each figure, for the page."""
        for chart in self.charts:
            yield chart.caption, base64.b64encode(png(chart)).decode()


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


def everything(one: Result) -> list[Table]:
    """The tables of the page: another with all keys of the rows where the others do not show them all."""
    rows = one.document["rows"]
    shown = {key for table in one.tables for key in table.keys}
    more = any(key not in shown for row in rows for key in row)
    return one.tables + ([table_of("Everything measured", None, rows, folded=True)] if more else [])


def read_results() -> list[Result]:
    """Every result, by benchmark in the order of the catalogue. Raises WorkError for one that cannot be read."""
    found = []
    for path in result.RESULTS.glob("*/*.json"):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise WorkError(f"{path}: not JSON ({error}); measure again, or remove it") from None
        if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
            raise WorkError(f"{path}: not a benchmark result: it has no list of rows")
        found.append(Result(benchmark_of(path.parent.name), path, document))
    order = [benchmark.name for benchmark in known_benchmarks()]

    def place(one: Result) -> tuple[int, str, str]:
        name = one.benchmark.name
        return order.index(name) if name in order else len(order), name, one.path.name

    return sorted(found, key=place)


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of that name; one that is unknown has every key of its rows as a column."""
    known = {benchmark.name: benchmark for benchmark in known_benchmarks()}
    return known.get(name) or Benchmark(name, name.replace("_", " "), object, no_result)


def known_benchmarks() -> tuple[Benchmark, ...]:
    """Every benchmark, in the order of the report."""
    from benchmarks import old

    return (*old.benchmarks(), *BENCHMARKS)


def write_report() -> Path:
    """Write RESULTS.md, its pictures and results.html; returns the path of RESULTS.md.

    Raises UseError where matplotlib is not installed, WorkError for a result that cannot be read.
    """
    page = render_page()
    for one in read_results():
        for chart, path in one.pictures:
            write_atomically(path, png(chart))
    write_atomically(result.RESULTS.parent / "results.html", page.encode())
    path = result.RESULTS.parent / "RESULTS.md"
    write_atomically(path, render_report().encode())
    return path


def render_page() -> str:
    """results.html, which needs nothing from outside. Raises UseError where matplotlib or jinja2 is not installed."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise UseError(f'the report needs {error.name}: pip install -e ".[benchmarks]"') from None
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["slug"] = slug
    by_title: dict[str, list[Result]] = {}
    for one in read_results():
        by_title.setdefault(one.benchmark.title, []).append(one)
    template = page.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(sections=by_title, tables_of=everything)


def render_report() -> str:
    """RESULTS.md: each result in a line, then a section for each."""
    results = read_results()
    short = [[f"[{markdown(one.name)}](#{_anchor(one.name)})", markdown(one.headline)] for one in results]
    introduction = (
        "Written by `python -m benchmarks report` from the JSON files in `results/`, with `results.html`, a page that "
        "has all figures and is not committed."
    )
    overview = _markdown_table(["result", "in short"], [False, False], short)
    return (
        "\n\n".join(["# Results", introduction, overview, *(part for one in results for part in _section(one))]) + "\n"
    )


def _section(one: Result) -> Iterator[str]:
    document = one.document
    yield f"## {markdown(one.name)}"
    if one.note:
        yield f"Note: {markdown(one.note)}"
    for table in one.tables:
        if not table.headings:
            continue
        if table.folded:
            yield f"<details><summary>{markdown(table.title)}</summary>"
        elif table.title:
            yield f"**{markdown(table.title)}**"
        cells = [[markdown(cell) for cell in row] for row in table.cells]
        yield _markdown_table([markdown(heading) for heading in table.headings], table.numeric, cells)
        if table.folded:
            yield "</details>"
    yield (
        f"{markdown_code(document.get('command', ''))} at commit {markdown(document.get('commit', ''))}, "
        f"{markdown(document.get('date', ''))[:10]}, on {markdown(one.machine)}: "
        f"[{markdown(one.path.name)}]({one.link})"
    )
    pictures = [(chart.caption, path) for chart, path in one.pictures]
    if not pictures and one.path.with_suffix(".png").exists():  # the benchmark itself has drawn it
        pictures = [(one.benchmark.title, one.path.with_suffix(".png"))]
    if pictures:
        folder = f"results/{one.benchmark.name}"
        yield "\n".join(f"![{_alternative(c)}]({quote(f'{folder}/{path.name}')})" for c, path in pictures)


def _markdown_table(headings: list[str], numeric: list[bool], cells: list[list[str]]) -> str:
    rule = "|".join("--:" if number else "---" for number in numeric)
    # Not padded: the length of one cell would be that of its whole column.
    return "\n".join([f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in cells)])


def markdown(text: Any) -> str:
    """Text for a cell of a Markdown table: one line, no column, no tag."""
    line = " ".join(str(text).split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def markdown_code(text: Any) -> str:
    """Text as code on one line, whatever backticks it has."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"


def slug(text: str) -> str:
    """Text as an id or class."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-") or "x"


def _alternative(text: str) -> str:
    return markdown(text).replace("[", "(").replace("]", ")")


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
