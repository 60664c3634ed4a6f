"""All results as documents: `benchmarks/RESULTS.md` with its pictures, and the page `benchmarks/results.html`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks import result
from benchmarks.benchmark import Benchmark, Result, no_result
from benchmarks.catalogue import BENCHMARKS
from benchmarks.charts import png
from benchmarks.pages import everything, render, require_page
from dist_train.files import write_atomically
from dist_train.output import say


@dataclass(frozen=True)
class Arguments:
    """Write all results as a page, benchmarks/results.html, and as benchmarks/RESULTS.md."""


def run(_: Arguments) -> None:
    """Write the documents and say where."""
    say(write_report())


COMMAND = Benchmark("report", "all results as a page and as Markdown", Arguments, run)


def read_results() -> list[Result]:
    """Every result, by benchmark in the order of the catalogue. Raises WorkError for one that cannot be read."""
    found = []
    for path in result.RESULTS.glob("*/*.json"):
        found.append(Result(benchmark_of(path.parent.name), path, result.read_document(path)))
    order = {benchmark.name: place for place, benchmark in enumerate(BENCHMARKS)}
    return sorted(found, key=lambda r: (order.get(r.benchmark.name, len(order)), r.benchmark.name, r.path.name))


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of that name; one that is unknown has every key of its rows as a column."""
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    return known.get(name) or Benchmark(name, name.replace("_", " "), object, no_result)


def write_report() -> Path:
    """Write RESULTS.md, its pictures, the pages of single results and results.html; returns the path of RESULTS.md.

    Raises UseError where matplotlib is not installed, WorkError for a result that cannot be read.
    """
    require_page()
    for one in read_results():
        if one.benchmark.write_page is not None:
            one.benchmark.write_page(one)
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
    require_page()
    by_title: dict[str, list[Result]] = {}
    for one in read_results():
        by_title.setdefault(one.benchmark.title, []).append(one)
    return render("report.html.jinja", sections=by_title, tables_of=everything)


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


def _alternative(text: str) -> str:
    return markdown(text).replace("[", "(").replace("]", ")")


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
