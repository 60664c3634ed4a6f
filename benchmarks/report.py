"""All results as documents: `benchmarks/RESULTS.md` with its charts, and the page `benchmarks/results.html`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks import result
from benchmarks.charts import STYLE, Chart, cost_charts
from benchmarks.charts_accuracy import accuracy_charts
from benchmarks.report_headlines import BENCHES, headline
from benchmarks.report_page import escaped, render_html, render_section, render_svg, slug
from benchmarks.report_tables import COLUMNS, Table, generic_columns, machine_of, note_of, table_of, tables_of, unlisted
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically

__all__ = ["COLUMNS", "render_page", "render_report", "write_report"]

PICTURED = ("loader", "study", "batch_size")
"""Benches whose figures are in the Markdown too, as PNG files beside the results."""


@dataclass(frozen=True)
class Result:
    """A result file and what is in it."""

    bench: str
    path: Path
    document: dict[str, Any]

    @property
    def ident(self) -> str:
        """Of its section."""
        return f"{slug(self.bench)}--{slug(self.path.stem)}"

    @property
    def link(self) -> str:
        """From the documents to the file."""
        return quote(f"results/{self.bench}/{self.path.name}")

    @property
    def charts(self) -> list[Chart]:
        """Its figures."""
        return cost_charts(self.bench, self.document) + accuracy_charts(self.bench, self.document)

    def picture(self, chart: Chart) -> Path:
        """The PNG file of a figure."""
        # The loader benchmark has one figure.
        name = self.path.stem if self.bench == "loader" else f"{self.path.stem}-{chart.name}"
        return self.path.with_name(f"{name}.png")


def write_report() -> Path:
    """Write RESULTS.md, its charts and results.html anew; returns the path of RESULTS.md.

    Raises UseError where matplotlib is not installed, WorkError for a result that cannot be read.
    """
    page = render_page()
    for one in read_results():
        for chart in one.charts if one.bench in PICTURED else []:
            write_atomically(one.picture(chart), _png(chart))
    write_atomically(result.RESULTS.parent / "results.html", page.encode())
    path = result.RESULTS.parent / "RESULTS.md"
    write_atomically(path, render_report().encode())
    return path


def read_results() -> list[Result]:
    """Every result, by bench in the order of BENCHES, then by name. Raises WorkError for one that cannot be read."""
    found = []
    for path in result.RESULTS.glob("*/*.json"):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise WorkError(f"{path}: no JSON ({error}); measure again, or remove it") from None
        if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
            raise WorkError(f"{path}: no benchmark result: it has no list of rows")
        found.append(Result(path.parent.name, path, document))
    order = {bench: i for i, bench in enumerate(BENCHES)}
    return sorted(found, key=lambda one: (order.get(one.bench, len(order)), one.bench, one.path.name))


def render_page() -> str:
    """results.html. Raises UseError where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UseError('the report\'s charts need matplotlib: pip install -e ".[benchmarks]"') from None
    sections = []
    for one in read_results():
        figures = []
        for chart in one.charts:
            with matplotlib.rc_context(STYLE):
                figures.append((chart, render_svg(chart.draw(), f"{one.ident}--{chart.name}", chart.caption)))
        tables = tables_of(one.bench, one.document)
        rows = one.document["rows"]
        if unlisted(one.bench, rows):
            tables.append(replace(table_of("Everything measured", generic_columns(rows), rows), folded=True))
        line = headline(one.bench, one.document)
        content = render_section(one.ident, one.link, line, one.document, tables, figures)
        sections.append((one.bench, one.ident, line, content))
    return render_html(sections)


def render_report() -> str:
    """RESULTS.md: each result in a line, then a section for each."""
    results = read_results()
    lines = [
        "# Results",
        "",
        "Written by `python -m benchmarks report` from the JSON files in `results/`, with `results.html`, a page that "
        "has all figures and is not committed.",
        "",
        "| result | in short |",
        "|---|---|",
    ]
    for one in results:
        heading = f"{one.bench}: {one.path.stem}"
        lines.append(f"| [{markdown(heading)}](#{_anchor(heading)}) | {markdown(headline(one.bench, one.document))} |")
    return "\n\n".join(["\n".join(lines), *(_section(one) for one in results)]) + "\n"


def markdown(text: Any) -> str:
    """Text for a cell of a Markdown table: one line, no column, no tag."""
    line = " ".join(str(text).split())
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")


def markdown_code(text: Any) -> str:
    """Text as code on one line, whatever backticks it has."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if fence == "`" else f"{fence} {line} {fence}"


def _section(one: Result) -> str:
    document = one.document
    parts = [f"## {markdown(f'{one.bench}: {one.path.stem}')}"]
    parts += [f"Note: {markdown(note)}" for note in [note_of(document)] if note]
    for table in tables_of(one.bench, document):
        parts += _table(table)
    name = markdown(one.path.name)
    parts.append(
        f"{markdown_code(document.get('command', ''))} at commit {markdown(document.get('commit', ''))}, "
        f"{markdown(document.get('date', ''))[:10]}, on {markdown(machine_of(document))}: [{name}]({one.link})"
    )
    pictures = [(chart.caption, one.picture(chart)) for chart in one.charts] if one.bench in PICTURED else []
    if one.bench == "landscape" and one.path.with_suffix(".png").exists():  # the bench itself draws it
        pictures = [("loss surfaces", one.path.with_suffix(".png"))]
    if pictures:
        images = (f"![{_alternative(what)}]({quote(f'results/{one.bench}/{path.name}')})" for what, path in pictures)
        parts.append("\n".join(images))
    return "\n\n".join(parts)


def _table(table: Table) -> Iterator[str]:
    if not table.headings:
        return
    lines = [
        "| " + " | ".join(map(markdown, table.headings)) + " |",
        "|" + "|".join("--:" if number else "---" for number in table.numeric) + "|",
        *("| " + " | ".join(map(markdown, cells)) + " |" for cells in table.cells),
    ]
    if table.folded:
        yield f"<details><summary>{escaped(table.title)}</summary>"
    elif table.title:
        yield f"**{markdown(table.title)}**"
    yield "\n".join(lines)
    if table.folded:
        yield "</details>"


def _alternative(text: str) -> str:
    return markdown(text).replace("[", "(").replace("]", ")")


def _anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _png(chart: Chart) -> bytes:
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        chart.draw().savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
