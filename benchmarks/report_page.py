"""The report as one HTML page that needs nothing from outside: styles and figures are in it, and it has no script."""

from __future__ import annotations

import html
import io
import json
import re
from typing import TYPE_CHECKING, Any

from benchmarks.charts import STYLE, Chart
from benchmarks.report_headlines import BENCHES
from benchmarks.report_tables import Document, Table, machine_of, note_of, text_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1d1f; --soft: #5c5f66; --line: #dcdcd8;
  --mark: #e4f0f8; --link: #00588f; --good: #1b6e35; --bad: #a32020; --open: #7a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #1f2226; --ink: #e8e8e6; --soft: #a5a9b0;
  --line: #383c42; --mark: #17364a; --link: #7cc0ee; --good: #7fd49a; --bad: #ff9a94; --open: #e8c66a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto,
  "DejaVu Sans", sans-serif; }
main, header, nav { max-width: 1320px; margin: 0 auto; padding: 0 20px; }
h1 { margin: 28px 0 4px; font-size: 30px; line-height: 1.2; }
h2 { margin: 56px 0 2px; padding-top: 12px; font-size: 24px; line-height: 1.25; border-top: 2px solid var(--line); }
h3 { margin: 28px 0 4px; font-size: 18px; overflow-wrap: anywhere; }
h4 { margin: 18px 0 6px; font-size: 15px; font-weight: 600; }
p { margin: 6px 0; }
a { color: var(--link); }
code, pre { font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; }
.soft, figcaption, .from { color: var(--soft); }
nav ul { display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0; padding: 0; list-style: none; }
nav a { display: block; padding: 5px 12px; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  text-decoration: none; }
.overview { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px; }
.overview a { display: block; padding: 12px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; color: inherit; text-decoration: none; }
.overview b { display: block; color: var(--link); overflow-wrap: anywhere; }
.overview a:hover, nav a:hover { border-color: var(--link); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px;
  margin: 14px 0; align-items: start; }
figure { margin: 0; padding: 10px; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure svg { display: block; width: 100%; height: auto; max-width: 480px; margin: 0 auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin: 6px 4px 0; color: #55585e; font-size: 13.5px; line-height: 1.4; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; color: var(--soft); font-weight: 600; min-width: 4.2em; }
td { white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; }
.w { white-space: normal; min-width: 17em; }
tr.mark td { background: var(--mark); }
td:first-child { font-weight: 500; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--link); }
.from { font-size: 14px; }
.confirmed { color: var(--good); font-weight: 700; } .not-confirmed { color: var(--bad); font-weight: 700; }
.undecided { color: var(--open); font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 8px 0; font-size: 14px; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main, header, nav { padding: 0 12px; }
  h1 { font-size: 26px; } h2 { font-size: 21px; margin-top: 40px; }
  figure { padding: 4px; }
  .stacked thead { display: none; }
  .stacked tr { display: block; padding: 8px 2px; border-bottom: 1px solid var(--line); }
  .stacked td { display: block; white-space: normal; min-width: 0; border: 0; padding: 2px 10px; text-align: left; }
  .stacked td:first-child { font-weight: 600; }
}
@media print { .scroll { overflow: visible; } nav { display: none; } }
""".strip()
_TITLE = "Results of the benchmarks"


def render_html(sections: list[tuple[str, str, str, str]]) -> str:
    """The page. sections: (bench, id, headline, HTML) of each result, those of a bench one after the other."""
    benches = list(dict.fromkeys(bench for bench, _, _, _ in sections))
    links = "".join(f'<li><a href="#{slug(bench)}">{escaped(bench.replace("_", " "))}</a></li>' for bench in benches)
    cards = "".join(
        f'<a href="#{ident}"><b>{escaped(ident.replace("--", ": "))}</b>{escaped(line)}</a>'
        for _, ident, line, _ in sections
    )
    body = []
    for bench in benches:
        title = BENCHES.get(bench, bench.replace("_", " "))
        body.append(f'<section id="{slug(bench)}"><h2>{escaped(title)}</h2>')
        body += [content for which, _, _, content in sections if which == bench]
        body.append("</section>")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_TITLE}</title>",
            f"<style>{CSS}</style></head><body>",
            f"<header><h1>{_TITLE}</h1>",
            '<p class="soft">Written by <code>python -m benchmarks report</code> from the JSON files in '
            '<code>benchmarks/results/</code>; the tables are also in <a href="RESULTS.md">RESULTS.md</a>.</p>'
            "</header>",
            f'<nav aria-label="Benchmarks"><ul>{links}</ul></nav>',
            f'<main><div class="overview">{cards}</div>',
            *body,
            "</main></body></html>\n",
        ]
    )


def render_section(
    ident: str, link: str, line: str, document: Document, tables: list[Table], figures: list[tuple[Chart, str]]
) -> str:
    """A result: its headline, answers, figures, other tables, and where it comes from. link: of its JSON file."""
    name = link.rsplit("/", 1)[-1].removesuffix(".json")
    parts = [f'<article id="{ident}"><h3>{escaped(name)}</h3><p>{escaped(line)}</p>']
    parts += [f'<p class="soft">Note: {escaped(note)}</p>' for note in [note_of(document)] if note]
    first = [table for table in tables if table.stacked]
    parts += [render_table(table) for table in first]
    if figures:
        parts.append('<div class="figures">')
        parts += [f"<figure>{svg}<figcaption>{escaped(chart.caption)}</figcaption></figure>" for chart, svg in figures]
        parts.append("</div>")
    parts += [render_table(table) for table in tables if not table.stacked]
    parts += [_provenance(link, document), "</article>"]
    return "\n".join(parts)


def render_table(table: Table) -> str:
    """A table in a box of its own that scrolls where it is too wide."""
    if not table.headings:
        return ""
    wide = [any(len(cells[i]) > 40 for cells in table.cells) for i in range(len(table.headings))]
    classes = ["n" if number else "w" if long else "" for number, long in zip(table.numeric, wide, strict=True)]

    def cell(tag: str, text: str, kind: str) -> str:
        if text in ("confirmed", "not confirmed", "undecided"):
            kind = f"{kind} {slug(text)}".strip()
        return f'<{tag} class="{kind}">{escaped(text)}</{tag}>' if kind else f"<{tag}>{escaped(text)}</{tag}>"

    head = "".join(cell("th", heading, kind) for heading, kind in zip(table.headings, classes, strict=True))
    rows = [
        ('<tr class="mark">' if i in table.marked else "<tr>")
        + "".join(cell("td", text, kind) for text, kind in zip(cells, classes, strict=True))
        + "</tr>"
        for i, cells in enumerate(table.cells)
    ]
    kind = ' class="stacked"' if table.stacked else ""
    body = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"
    # A box that scrolls must be reachable with the keyboard.
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(table.title or "Table")}">{body}</div>'
    if table.folded:
        return f"<details><summary>{escaped(table.title)}</summary>{box}</details>"
    return (f"<h4>{escaped(table.title)}</h4>" if table.title else "") + box


def render_svg(figure: Figure, ident: str, label: str) -> str:
    """The figure as an SVG element whose ids begin with `ident`, the same bytes each time."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": ident}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(content, format="svg", metadata=nothing, dpi=110)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg))
    used = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{ident}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', Verdana, sans-serif", svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{ident}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{ident}-\1)", svg)
    # A hundredth of a point is more than a screen shows.
    svg = re.sub(r'(?<= )(d|x|y|transform)="([^"]*)"', lambda found: f'{found[1]}="{_shorter(found[2])}"', svg)
    opening, _, rest = svg.partition(">")
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escaped(label)}">{rest.strip()}'


def escaped(text: Any) -> str:
    """Text without a meaning in HTML."""
    return html.escape(str(text))


def slug(text: str) -> str:
    """Text as an id or class."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-") or "x"


def _shorter(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), numbers)


def _provenance(link: str, document: Document) -> str:
    versions = "".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(text_of(number) or 'not installed')}</dd>"
        for name, number in (document.get("versions") or {}).items()
    )
    parameters = json.dumps(document.get("parameters") or {}, indent=1, ensure_ascii=False)
    return (
        f'<p class="from"><code>{escaped(document.get("command", ""))}</code><br>'
        f"commit {escaped(document.get('commit', ''))}, {escaped(document.get('date', ''))[:10]}, "
        f'{escaped(machine_of(document))}: <a href="{escaped(link)}">{escaped(link.rsplit("/", 1)[-1])}</a></p>'
        f"<details><summary>Versions and parameters</summary><dl>{versions}</dl>"
        f"<pre>{escaped(parameters)}</pre></details>"
    )
