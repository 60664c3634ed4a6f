"""The page of a batch-size profile: what it advises follows from the rows, and it stays readable whatever they hold."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result
from benchmarks.benchmark import Result
from benchmarks.speed.batch_size import BENCHMARK
from benchmarks.speed.knee import predicted_knee
from benchmarks.speed.profile import advice, choices, missing, render_profile, tables, write_page
from benchmarks.speed.recommend import mark
from tests.benchmarks.test_report import HOSTILE, Page
from tests.harness import REPOSITORY
from tests.use.browser import chromium

pytest.importorskip("matplotlib")


def row(batch: int, top1: list[float], minutes: float, **more: Any) -> dict[str, Any]:
    """A row of a batch that was trained."""
    figures: dict[str, Any] = {
        **{"backbone": "vit_tiny_patch16", "head": "cls", "image_size": 64, "batch_size": batch, "micro_batch": batch},
        **{
            "accumulation": 1,
            "compile": "none",
            "precision": "float32",
            "step_ms": 100.0,
            "images_per_s": 10.0 * batch,
        },
        **{"peak_mb": 900.0 + batch, "epoch_minutes": minutes / 5, "train_minutes": minutes},
        **{"top1": statistics.fmean(top1), "top1_by_seed": top1, "seeds": len(top1), "trained_at": "abc1234"},
    }
    if len(top1) > 1:
        figures["top1_error"] = statistics.stdev(top1) / len(top1) ** 0.5
    return figures | more


def result_of(rows: list[dict[str, Any]], folder: Path = Path("x"), name: str = "made-up", **more: Any) -> Result:
    mark(rows, 1.0, steps=10)
    document = {"rows": rows, "tolerance": 1.0, "command": "python -m benchmarks batch_size", "commit": "abc1234"}
    return Result(BENCHMARK, folder / f"{name}.json", document | more)


FOUR = [
    row(16, [0.80, 0.82, 0.81, 0.81], 90.0),
    row(64, [0.81, 0.80, 0.81, 0.80], 45.0),
    row(256, [0.70, 0.71, 0.70, 0.71], 0.5),
]


def test_four_seeds_give_advice_with_its_certainty_and_cost() -> None:
    """64 falls short of 81 - 1 points only where 16's draws are far better than its own."""
    what, sure, cost = advice(result_of([dict(one) for one in FOUR]).document)
    assert what == (
        "Train at batch 64: of the 3 that were trained it is the quickest whose top-1, 80.5 ± 0.3 %, is within 1 point "
        "of the best, 81.0 ± 0.4 % at batch 16."
    )
    assert re.fullmatch(
        r"How sure that is: likely; batch 64 is recommended in 9\d % of resamples of the 4 seeds and step times, "
        r"batch 16 in \d %\.",
        sure,
    )
    assert cost == "The steps of such a training take 45 minutes; energy was not measured."


def test_nothing_is_settled_by_times_of_a_machine_that_had_other_work() -> None:
    rows = [row(16, [0.6, 0.61, 0.6, 0.61], 90.0), row(64, [0.81, 0.8, 0.81, 0.8], 45.0)]
    assert advice(result_of(rows, busy_elsewhere=0.05).document)[1].startswith("How sure that is: settled; batch 64")
    sure = advice(result_of(rows, busy_elsewhere=0.4).document)[1]
    assert sure.startswith("How sure that is: open, as other processes took 40 % of the processor")
    assert sure.endswith("batch 64 is recommended in 100 % of resamples of the 4 seeds and step times.")


def test_little_evidence_is_said_to_be_little() -> None:
    one_seed = [row(16, [0.9], 9.0), row(64, [0.7], 5.0)]
    what, sure, _ = advice(result_of(one_seed).document)
    assert "batch 16: of the 2 that were trained it has the best top-1, 90.0 %, and none that is quicker comes" in what
    assert "one seed decides nothing" in sure and "resamples" not in sure
    _, sure, _ = advice(result_of([row(16, [0.9, 0.91], 9.0), row(64, [0.7, 0.71], 5.0)]).document)
    assert "a hint, as 2 seeds are few" in sure and "in 100 % of resamples" in sure
    what, sure, cost = advice(result_of([row(16, [0.9, 0.91], 9.0, step_ms_p95=250.0)]).document)
    assert "9 minutes (roughly: a slow step took 2.5 times the usual);" in cost
    assert what.startswith("Only batch 16 was trained") and sure == "It was trained with 2 seeds."
    assert advice({"rows": [{"batch_size": 4, "step_ms": 1.0}]}) == []


def test_energy_may_choose_another_batch() -> None:
    rows = [row(16, [0.8], 9.0, train_wh=2.0, train_price=0.3), row(64, [0.8], 5.0, train_wh=3.0, train_price=0.2)]
    one = result_of(rows, parameters={"sweep": {"price_per_hour": 2.5}})
    assert advice(one.document)[2] == (
        "The steps of such a training take 5 minutes, use 3 Wh and cost 0.2 at 2.5 an hour; by energy it would be "
        "batch 16."
    )
    assert dict(choices(one.document)) == {
        "time": "batch 64, top-1 80.0 %, 5 minutes a training, by one seed",
        "money": "batch 64, top-1 80.0 %, 0.2 a training, by one seed",
        "energy": "batch 16, top-1 80.0 %, 2 Wh a training, by one seed",
    }
    assert {chart.name for chart in one.charts} >= {"pareto", "pareto_price", "pareto_wh", "accuracy"}


def test_eager_and_compiled_stand_side_by_side() -> None:
    eager, compiled = row(16, [0.8], 9.0), row(16, [0.8], 6.0, compile="kernels", images_per_s=200.0)
    both = result_of([eager, compiled, row(64, [0.7], 5.0)])
    (table,) = [table for table in tables(both) if table.title == "Eager and compiled"]
    assert table.headings == ["batch", "eager, images/s", "kernels, images/s", "kernels over eager"]
    assert table.cells == [["16", "160.0", "200.0", "1.25"], ["64", "640.0", "", ""]]
    assert not any("Eager beside compiled" in line for line in missing(both))
    assert any("Eager beside compiled" in line for line in missing(result_of([eager])))


def test_what_was_not_measured_is_said_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    bare = "\n".join(missing(result_of([row(16, [0.8], 9.0, no_energy="no counter here")])))
    for said in ("--seeds 4", "Energy: no counter here.", "--price-per-hour", "--arm end_to_end", "none,kernels"):
        assert said in bare
    assert "--search" in bare and "--train.noise_every" in bare and "knee --name made-up" in bare
    all_there = {
        "train_wh": 1.0,
        "train_price": 1.0,
        "data_wait_share": 0.1,
        "largest_micro_batch": 64,
        "noise_scale": 99.0,
    }
    rows = [row(16, [0.8, 0.9], 9.0, **all_there), row(16, [0.8, 0.9], 8.0, compile="kernels", **all_there)]
    (tmp_path / "knee").mkdir()
    (tmp_path / "knee/made-up.json").write_text(
        json.dumps({"rows": [], "knees": [{"stage": 0.2, "says": "37 (22 to 61)"}]})
    )
    one = result_of(rows)
    assert list(missing(one)) == []
    cells = [cell for table in tables(one) for line in table.cells for cell in line]
    assert "99" in cells and "20%" in cells and "37 (22 to 61)" in cells


def test_the_predicted_knee_is_what_runs_logged_last(tmp_path: Path) -> None:
    def run(name: str, *entries: dict[str, Any]) -> Path:
        (tmp_path / name).mkdir()
        lines = [json.dumps(entry) for entry in entries]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "noise_sc']))
        return tmp_path / name

    first = run("a", {"step": 1, "noise_scale": 5.0}, {"step": 2, "noise_scale": 100.0, "noise_scale_low": 50.0}, {})
    second = run("b", {"step": 2, "noise_scale": 200.0, "noise_scale_low": 60.0, "noise_scale_high": None})
    without = run("c", {"step": 2, "loss": 1.0, "noise_scale": None})
    # No upper end is known of either: it is infinite, and no figure.
    assert predicted_knee([first, second, without]) == {"noise_scale": 150.0, "noise_scale_low": 55.0}
    assert predicted_knee([without, tmp_path / "nowhere"]) == {}


@pytest.mark.parametrize("name", ["demo", "photos"])
def test_the_committed_profiles_say_what_to_do_and_how_sure_that_is(name: str) -> None:
    path = REPOSITORY / f"benchmarks/results/batch_size/{name}.json"
    document = json.loads(path.read_bytes())
    shown = copy.deepcopy(document["rows"])
    mark(document["rows"], document["tolerance"], document["parameters"]["sweep"]["steps"])
    assert document["rows"] == shown, "what is recommended follows from the rows"
    page = render_profile(Result(BENCHMARK, path, document))
    Page(page)
    assert "Train at batch" in page and "of the 4 seeds and step times" in page


def hostile(tmp_path: Path, name: str) -> Path:
    """The page of a result whose every text is hostile and long."""
    rows = [dict(one) | {"head": head} for head in ("cls", HOSTILE) for one in FOUR]
    for one in rows:
        one |= {"backbone": HOSTILE, "compile": HOSTILE, "no_energy": HOSTILE, HOSTILE: HOSTILE}
    recipe = {"model": {"weights": HOSTILE}, "data": {"shards": "x" * 300}, "train": {"epochs": HOSTILE}}
    more = {"command": f"{HOSTILE} {'y' * 300}", "parameters": {"recipe": recipe}, "hardware": {"cpu": HOSTILE}}
    path = write_page(result_of(rows, tmp_path, name, **more))
    assert path == tmp_path / f"{name}.html"
    return path


def test_a_hostile_backbone_or_name_stays_text_and_nothing_is_asked_from_outside(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)> & \"b\" 'c'"
    source = hostile(tmp_path, name).read_text()
    page = Page(source)  # every tag is closed, no attribute is a handler
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert f"Batch-size profile: {name}" in html.unescape(source) and HOSTILE in page.cells
    for link in page.links:
        assert link.startswith("data:image/png;base64,") or link.endswith(".json"), link[:80]
    assert not re.search(r"<img src=x|<script|https?://", source)


def test_a_telephone_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    """With SCREENSHOTS=FOLDER it leaves pictures of the page there."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    kinds = [{"head": head, "compile": way} for head in ("cls", "ifa") for way in ("none", "kernels")]
    rows = [one | kind for kind in kinds for one in FOUR]
    usual = write_page(result_of(rows, tmp_path, "usual"))
    with chromium(program, tmp_path / "profile") as browser:
        for path in (usual, hostile(tmp_path, "n" * 200)):
            for width in (1280, 390):
                browser.open(path.as_uri(), width)
                browser.wait_for(f"document.readyState == 'complete' && window.innerWidth == {width}")
                assert browser.value("document.documentElement.scrollWidth") <= width, (path.name, width)
                wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')"
                assert browser.value(f"{wide} && e.getBoundingClientRect().right > {width}).length") == 0
                assert browser.value("[...document.images].every(i => i.naturalWidth > 500)")
                if folder := os.environ.get("SCREENSHOTS"):
                    (Path(folder) / f"profile-{path.stem[:8]}-{width}.png").write_bytes(browser.screenshot())
        assert not [url for url in browser.requested if not url.startswith(("file:", "data:", "about:"))]
