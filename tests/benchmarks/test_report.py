"""The report: everything in the results is in both documents, whatever the results hold, and nothing else is needed."""

from __future__ import annotations

import builtins
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import benchmark, pages, report, result
from benchmarks.__main__ import main
from benchmarks.catalogue import BENCHMARKS
from benchmarks.speed.batch_charts import over_batches
from benchmarks.speed.recommend import cheapest_ways
from benchmarks.tables import Table
from tests.benchmarks.test_report_study import study_rows

pytest.importorskip("matplotlib")

HOSTILE = '<script>alert(1)</script> | a\nb `c` & "d" $x_{$ </svg> {e} \\1'
VOID = {"meta", "br"}
KNOWN = {benchmark.name: benchmark for benchmark in BENCHMARKS}
COLUMNS = {name: benchmark.columns for name, benchmark in KNOWN.items() if benchmark.columns is not None}
YES_OR_NO = {"pareto", "recommended", "identical_weights", "each_sample_once", "searched_rate", "diverged"}


def tables_of(bench: str, document: dict[str, Any]) -> list[Table]:
    return benchmark.tables_of(report.benchmark_of(bench), document)


def headline(bench: str, document: dict[str, Any]) -> str:
    return report.benchmark_of(bench).say_headline(document)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of a report with a result of every bench."""
    results = tmp_path_factory.mktemp("report") / "results"
    everything(results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "RESULTS", results)
        assert main(["report"]) == 0
    return results


def put(results: Path, bench: str, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result file with the rows."""
    document = {
        "bench": bench,
        "command": f"python -m benchmarks {bench} --name {name}",
        "commit": "abc1234",
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": {"cpu": "some processor", "cores": 2, "memory_gb": 24, "gpus": ["some GPU"]},
        "versions": {"python": "3.11.7", "torch": "2.11.0", "ffcv": None},
        "parameters": {"size": 128, "batch_size": 64, "threads": 2},
        "rows": rows,
    }
    path = results / bench / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document | more))


def made_up_rows(columns: list[tuple[str, str, str]], number: int = 2) -> list[dict[str, Any]]:
    """Rows in which every column holds a number of its own."""
    words = {"loader", "note", "what", "arm", "backbone", "head", "precision", "experiment", "data", "head_init", "run"}
    words |= {"contestant", "lr_scaling", "budget", "table", "cell", "scale", "baseline", "features", "trained_at"}
    words |= {"remedy", "setting", "on"}
    rows = []
    for r in range(number):
        row: dict[str, Any] = {}
        for c, (key, _, form) in enumerate(columns):
            figure = 1001 + 100 * r + c
            row[key] = f"{key}-{figure}" if key in words else figure if form.endswith("d") else figure + 0.25
            row[key] = True if key in YES_OR_NO else "full" if key == "scale" else row[key]
        rows.append(row)
    return rows


def everything(results: Path) -> None:
    """A result of every bench."""
    for bench, columns in COLUMNS.items():
        if bench not in ("study", "landscape"):
            put(results, bench, "made-up", made_up_rows(columns))
    answers = [{"question": "Is it so?", "verdict": "not confirmed", "evidence": "1.5 points"}]
    put(results, "study", "made-up", study_rows(), answers=answers)
    surface(results)
    put(results, "gpu", "made-up", [{"what": "a product", "tflops": 512.5, "passed": True}])


def surface(results: Path) -> None:
    """A landscape result with arrays."""
    a = np.linspace(-1, 1, 5)
    loss = 1 + a[:, None] ** 2 + a[None] ** 2
    (results / "landscape").mkdir(parents=True, exist_ok=True)
    np.savez(results / "landscape/a.npz", a=a, b=a, loss=loss, top1=1 / loss, t=a, line_loss=1 + a)
    row = {"run": "runs/a", "backbone": "vit_tiny_patch16", "head": "ifa", "batch_size": 16, "loss": 1.0, "top1": 0.5}
    put(results, "landscape", "made-up", [row | {"mean_excess_loss": 0.625, "arrays": "a.npz"}])


class Page(HTMLParser):
    """Cells, tags and attributes of the page; raises AssertionError where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "td":
            self.cells.append("")
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, (tag, self._open[-3:])
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "td" in self._open:
            self.cells[-1] += data


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Cells of every table, without the rule below the headings."""
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    split = [[line.strip("|\n").split("|") for line in table.splitlines()] for table in tables]
    return [[[cell.strip() for cell in line] for line in (table[0], *table[2:])] for table in split]


def test_every_figure_of_every_row_is_in_both_documents(written: Path) -> None:
    text, page = (written.parent / "RESULTS.md").read_text(), Page((written.parent / "results.html").read_text())
    in_markdown = [html.unescape(cell) for table in markdown_tables(text) for line in table for cell in line]
    for bench, columns in COLUMNS.items():
        rows = json.loads((written / bench / "made-up.json").read_bytes())["rows"]
        for row in rows:
            for key, _, form in columns:
                if key in row:
                    expected = "yes" if key in YES_OR_NO else format(row[key], form)
                    assert expected in page.cells and expected in in_markdown, (bench, key, expected)
    for cell in ("512.5", "a product", "Is it so?", "not confirmed", "1.5 points"):
        assert cell in page.cells and cell in in_markdown


def test_each_result_says_where_it_comes_from(written: Path) -> None:
    text, page = (written.parent / "RESULTS.md").read_text(), (written.parent / "results.html").read_text()
    for bench in (*COLUMNS, "gpu"):
        for document in (text, page):
            assert f"python -m benchmarks {bench} --name made-up" in document
            assert f"results/{bench}/made-up.json" in document
    for said in ("abc1234", "2026-01-02", "2 cores of some processor, 24 GB, some GPU"):
        assert text.count(said) == page.count(said) == len(COLUMNS) + 1
    assert page.count("<dd>2.11.0</dd>") == page.count("<dd>not installed</dd>") == len(COLUMNS) + 1


def test_every_bench_with_something_to_show_has_its_figures(written: Path) -> None:
    page = (written.parent / "results.html").read_text()
    drawn = {bench: len(re.findall(rf'<article id="{bench}--.*?</article>', page, re.DOTALL)) for bench in COLUMNS}
    assert drawn == dict.fromkeys(COLUMNS, 1)
    figures = {}
    for bench in COLUMNS:
        article = re.search(rf'<article id="{bench}--.*?</article>', page, re.DOTALL)
        figures[bench] = article[0].count("<img ") if article else 0
    # Study: both data sets over batch sizes; scaling, steps, init, text, patch. Batch size: throughput, memory,
    # accuracy, fronts of time, money and energy. Engine: by operators and by phase, two ZeRO stages. Landscape:
    # surface and line.
    assert figures == {
        "study": 7,
        "paper": 2,
        "landscape": 2,
        "batch_size": 6,
        "ifa": 2,
        "step": 2,
        "engine": 4,
        "exchange": 0,
        "loader": 1,
        "scale": 0,
        "kill": 0,
        "probe": 1,
        "gap": 0,
        "knee": 0,
        "memory": 0,
        "noise": 0,
    }


def test_the_papers_accuracies_have_no_figure_beside_those_of_another_scale(results: Path) -> None:
    rows = [row | {"scale": "small"} for row in made_up_rows(COLUMNS["paper"])]
    put(results, "paper", "x", rows)
    report.write_report()
    assert "<img" not in (results.parent / "results.html").read_text()


def test_hostile_text_stays_text(results: Path) -> None:
    for bench, columns in COLUMNS.items():
        rows = made_up_rows(columns)
        for row, kept in zip(rows, ("scale", None), strict=True):  # only what is of full scale has figures
            row.update({key: HOSTILE for key, value in row.items() if isinstance(value, str) and key != kept})
        put(results, bench, "x", rows, command=HOSTILE, commit=HOSTILE, date=HOSTILE, parameters={"size": HOSTILE})
    put(results, "paper", "x", made_up_rows(COLUMNS["paper"]), parameters={"note": HOSTILE})
    put(results, "unknown <b>", "y & z", [{HOSTILE: HOSTILE}], versions={HOSTILE: HOSTILE})
    put(results, "study", "x", [row | {"data": HOSTILE} for row in study_rows()], answers=[{"question": HOSTILE}])
    report.write_report()
    text, source = (results.parent / "RESULTS.md").read_text(), (results.parent / "results.html").read_text()
    page = Page(source)  # every tag is closed
    assert "script" not in page.tags and "b>" not in page.tags
    assert HOSTILE in page.cells and f"Note: {HOSTILE}" in html.unescape(source) and "Note: &lt;script" in text
    for table in markdown_tables(text):
        assert len({len(line) for line in table}) == 1, table[0]
    outside_code = re.sub(r"(`+) .*? \1", "", text)
    assert "<script" not in outside_code and "&lt;script&gt;" in outside_code


def test_the_page_asks_for_nothing_from_outside(written: Path) -> None:
    source = (written.parent / "results.html").read_text()
    page = Page(source)
    for link in page.links:
        assert link.startswith(("#", "results/", "data:image/png;base64,")) or link == "RESULTS.md", link[:80]
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif link.startswith("results/"):
            assert (written.parent / link).is_file()
    assert len(page.ids) == len(set(page.ids)) > 20
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form", "metadata"}
    assert "@import" not in source and not re.search(r"url\((?!#)", source) and "<?xml" not in source
    assert set(re.findall(r"https?://[^\"' <>]*", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert '<meta name="viewport"' in source and "prefers-color-scheme: dark" in source


def test_the_same_results_give_the_same_bytes(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in written.parent.rglob("*") if path.suffix in (".md", ".html", ".png")]
    before = {path: path.read_bytes() for path in files}
    assert (
        len([path for path in files if path.suffix == ".png"]) == 1 + 7 + 6 + 2
    )  # loader, study, batch_size, landscape
    monkeypatch.setattr(result, "RESULTS", written)
    report.write_report()
    assert {path: path.read_bytes() for path in files} == before


def test_the_pictures_of_the_markdown_are_there(written: Path) -> None:
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (written.parent / "RESULTS.md").read_text())
    assert len(set(linked)) == 1 + 7 + 6 + 2 and all((written.parent / link).is_file() for link in linked)
    assert "results/loader/made-up.png" in linked and "results/landscape/made-up.png" in linked


def test_a_bench_without_columns_has_every_key_as_one(results: Path) -> None:
    rows = [{"what": "a", "new_figure": 1234.5678}, {"what": "b", "other": False, "list": [1, 2]}]
    put(results, "brand_new", "x", rows, targets=[{"what": "fast", "limit": 0.125, "met": None}])
    (targets, table) = tables_of("brand_new", json.loads((results / "brand_new/x.json").read_bytes()))
    assert table.headings == ["what", "new figure", "other", "list"]
    assert table.cells == [["a", "1,235", "", ""], ["b", "", "no", "[1, 2]"]]
    assert table.numeric == [False, True, False, False]
    assert targets.cells == [["fast", "0.125"]]
    for document in (report.render_report(), report.render_page()):
        assert "new figure" in document and "1,235" in document and "0.125" in document


def test_missing_keys_leave_blanks(results: Path) -> None:
    for bench, columns in COLUMNS.items():
        rows = made_up_rows(columns, 3)
        del rows[0][columns[-1][0]]
        rows[1][columns[-1][0]] = None
        rows[2] = {columns[0][0]: rows[2][columns[0][0]]}
        put(results, bench, "x", rows, versions=None, hardware={}, parameters=None)
        table = tables_of(bench, {"rows": rows})[-1]
        assert table.cells[2][1:] == [""] * (len(table.headings) - 1)
    for bench in (*COLUMNS, "gpu"):
        put(results, bench, "empty", [])
        put(results, bench, "bare", [{}])
        (results / bench / "nothing-else.json").write_text('{"rows": [{"what": 1}]}')
    report.write_report()
    Page((results.parent / "results.html").read_text())
    rows = [{"loader": "FFCV", "absent": "No module named 'ffcv'"}, {"loader": "timm", "images_per_s": 5.0}]
    assert tables_of("loader", {"rows": rows})[0].cells == [
        ["FFCV", "not measured: No module named 'ffcv'"],
        ["timm", "5"],
    ]
    rows = [{"batch_size": 64, "out_of_memory": True}, {"batch_size": 32, "step_ms": 2.0, "out_of_memory": 3}]
    assert tables_of("batch_size", {"rows": rows})[0].cells == [["64", "out of memory"], ["32", "2.0"]]
    rows = [{"batch_size": size, "images_per_s": 9.0, "out_of_memory": size == 64 or 3} for size in (16, 32, 64)]
    (throughput,) = over_batches(rows, "peak_mb")
    assert list(throughput.draw.keywords["crosses"]) == [64]  # the others ran out and got what they needed after all


def test_a_gpu_has_a_table_for_each_kind_of_point() -> None:
    step = {"what": "step: a", "backbone": "vit_base_patch16", "batch_size": 256, "step_ms": 31.25, "over_bare": 1.0204}
    rows = [
        {"what": "check: a", "met": True, "cls_float32_loss": 1e-7},
        {"what": "check: b", "skipped": "needs a GPU"},
        step | {"ifa_over_cls": 1.0031, "device_mb": 20400.0},
        {"what": "step: b", "error": "broken"},
        {"what": "loader: a", "images_per_s": 30000.0, "over_dali": 1.01},
        {"what": "another", "figure": 7},
    ]
    targets = [{"what": "target: a", "value": 1.02, "bound": "at most", "limit": 1.03, "met": True}]
    tables = tables_of("gpu", {"rows": rows, "targets": targets})
    assert [table.title for table in tables] == ["Targets", "Correctness", "Training steps", "Loaders", ""]
    assert tables[1].headings == ["check", "met", "skipped"] and tables[1].cells[0] == ["check: a", "yes", ""]
    assert tables[2].cells[0] == ["vit_base_patch16", "256", "31.25", "1.020", "1.0031", "20,400", ""]
    assert tables[2].cells[1][-1] == "broken" and tables[3].cells == [["loader: a", "30,000", "1.010"]]
    assert tables[4].cells == [["another", "7"]]
    for some, more in ((rows, True), (rows[4:5], False), (rows[5:], False)):
        one = benchmark.Result(KNOWN["gpu"], Path("x"), {"rows": some})
        assert (pages.everything(one)[-1].title == "Everything measured") is more


def test_the_pareto_figure_takes_the_cheapest_way_to_each_batch() -> None:
    base = {"backbone": "vit_tiny_patch16", "head": "cls", "batch_size": 64, "top1": 0.5}
    whole, parts = base | {"micro_batch": 64, "train_minutes": 3.0}, base | {"micro_batch": 16, "train_minutes": 2.0}
    assert cheapest_ways([whole, parts], "train_minutes") == [parts]
    assert cheapest_ways([whole, parts | {"head": "ifa"}], "train_minutes") == [whole, parts | {"head": "ifa"}]


def test_each_bench_says_its_result_in_a_line() -> None:
    loaders = [
        ("this project", 300.0, 1.0),
        ("FFCV", 200.0, 1.5),
        ("timm", 100.0, 3.0),
        ("ceiling: decode", 900.0, 0.3),
    ]
    rows: list[dict[str, Any]] = [
        {"loader": name, "images_per_s": rate, "ours_is_times": times} for name, rate, times in loaders
    ]
    assert headline("loader", {"rows": rows}) == "300 images/s, 1.50 to 3.00 times the 2 others"
    trained = {"head": "cls", "batch_size": 16, "images_per_s": 100.0, "recommended": True, "top1": 0.5}
    assert headline("batch_size", {"rows": [trained]}).endswith("top-1 50.00%, by one seed, which decides nothing")
    answers = [{"verdict": "confirmed"}, {"verdict": "undecided"}, {"verdict": "confirmed"}]
    said = headline("study", {"rows": [{}] * 7, "answers": answers})
    assert said == "Of 3 questions 2 confirmed, 1 undecided; 7 training runs"
    kill = {"kills": 20, "ranks": 2, "identical_weights": True, "each_sample_once": True}
    assert "20 kills on 2 ranks: weights bit-identical" in headline("kill", {"rows": [kill]})
    assert "not all" in headline("kill", {"rows": [kill, kill | {"identical_weights": False}]})
    cells = [
        {"scale": "full", "top1": 80.0, "difference_points": -3.0},
        {"scale": "full", "top1": None},
        {"scale": "full", "top1": 84.0, "difference_points": 1.0},
    ]
    said = headline("paper", {"rows": cells})
    assert said == "2 of 3 cells run at full scale, on average 2.0 points from the paper's"
    said = headline("paper", {"rows": [cell | {"scale": "small", "difference_points": None} for cell in cells]})
    assert said == "2 of 3 cells run at small scale"
    assert headline("unheard_of", {"rows": [{}]}) == "1 row"


def test_arrays_are_read_only_beside_the_results(results: Path) -> None:
    surface(results)
    document = json.loads((results / "landscape/made-up.json").read_bytes())
    (results / "landscape/a.npz").rename(results.parent / "a.npz")
    document["rows"][0]["arrays"] = "../../a.npz"
    (results / "landscape/made-up.json").write_text(json.dumps(document))
    assert "<img" not in report.render_page()


def test_a_file_that_is_no_result_and_missing_matplotlib_are_one_clear_line(
    results: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(results, "gpu", "x", [{"what": "a"}])
    (results / "gpu/cut.json").write_text('{"rows": [')
    assert main(["report"]) == 1
    assert "cut.json: not JSON" in capfd.readouterr().err
    (results / "gpu/cut.json").unlink()
    real = builtins.__import__

    def without_matplotlib(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert "| what |" in report.render_report()  # the Markdown's text needs none
    assert main(["report"]) == 2
    assert 'pip install -e ".[benchmarks]"' in capfd.readouterr().err
    assert not (results.parent / "results.html").exists()
