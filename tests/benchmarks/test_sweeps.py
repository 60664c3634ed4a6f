"""Runs trained to their end for the sweeps: resumed, isolated from each other, and what the sweeps make of them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import points, result
from benchmarks.__main__ import main
from benchmarks.benchmark import tables_of
from benchmarks.claims import runs
from benchmarks.claims.runs import finish_runs, is_finished, train_point
from benchmarks.report import benchmark_of
from benchmarks.speed import fit, sweep
from benchmarks.speed.recommend import mark
from benchmarks.speed.step import measure
from benchmarks.speed.sweep import Arguments
from dist_train import machine
from dist_train.cli import parse_recipe
from dist_train.config import Recipe
from dist_train.errors import UseError, WorkError
from dist_train.train import memory, meters, micro_batch
from dist_train.train.settings import precision_of
from tests.harness import write_shard_set

SMALL = (
    "--data.image_size 32 --data.crop_margin 8 --data.threads 1 --model.backbone vit_tiny_patch16 --model.dropout 0.1"
)


@pytest.fixture
def shards(shard_set: Callable[..., Path]) -> Path:
    return shard_set({"train": [20], "val": [4], "test": [9]}, baked=40)


def small(shards: Path, run: Path, *more: str) -> Recipe:
    words = f"{SMALL} --data.shards {shards} --train.run {run} --train.epochs 1 --train.batch_size 4".split()
    return parse_recipe([*words, *more])[0]


@pytest.mark.launch
@pytest.mark.slow  # tests/use/test_from_python.py has runs in one process, too
def test_a_run_is_the_same_after_others_in_one_process_and_alone(shards: Path, tmp_path: Path) -> None:
    """Bit for bit; finished runs are not trained again, and another recipe's folder is refused."""
    first, second = (small(shards, tmp_path / name, "--train.seed", seed) for name, seed in (("a", "1"), ("b", "2")))
    assert {r.train.run for r in finish_runs([first, second], 1, "runs")} == {
        first.train.run,
        second.train.run,
    }
    alone = [sys.executable, "-m", "dist_train.cli", "train", *f"{SMALL} --data.shards {shards}".split()]
    alone += f"--train.run {tmp_path / 'alone'} --train.epochs 1 --train.batch_size 4 --train.seed 2".split()
    environment = points.environment_of_one_process() | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    subprocess.run(alone, check=True, capture_output=True, env=environment)
    weights = [next((tmp_path / name / "checkpoints").glob("*/weights.safetensors")) for name in ("b", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    written = {run: (tmp_path / run / "summary.json").stat().st_mtime_ns for run in "ab"}
    assert len(list(finish_runs([first, second], 2, "runs"))) == 2
    assert written == {run: (tmp_path / run / "summary.json").stat().st_mtime_ns for run in "ab"}
    with pytest.raises(UseError, match=r"/a: holds a run of another recipe"):
        list(finish_runs([replace(first, train=replace(first.train, epochs=2))], 1, "runs"))


def test_a_commit_is_marked_where_the_code_has_changes_not_where_a_result_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a sweep that goes on in the result that it had begun would take it for another commit's."""
    code, of_a_sweep, report = (tmp_path / "benchmarks" / name for name in ("a.py", "results/b/c.json", "RESULTS.md"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    of_a_sweep.parent.mkdir(parents=True)
    for file in (code, of_a_sweep, report):
        file.write_text("before")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(machine, "__file__", str(code))
    monkeypatch.setattr(result, "RESULTS", tmp_path / "elsewhere")

    def commit() -> str:
        return json.loads(result.write_result("bench", "name", {}, []).read_bytes())["commit"]

    clean = commit()
    of_a_sweep.write_text("after")
    report.write_text("after")
    assert commit() == clean != ""
    code.write_text("after")
    assert commit() == f"{clean}+"


@pytest.mark.parametrize("auto", ["--data.mean=auto --data.std=auto", "--train.micro_batch_size=auto"])
def test_a_finished_run_is_known_by_a_recipe_whose_auto_it_has_resolved(
    shards: Path, tmp_path: Path, auto: str
) -> None:
    recipe = small(shards, tmp_path / "run", *auto.split())
    assert train_point(asdict(recipe)) and is_finished(recipe)
    with pytest.raises(UseError, match="/run: holds a run of another recipe"):
        is_finished(replace(recipe, data=replace(recipe.data, mean=(0.1, 0.2, 0.3))))
    write_shard_set(shards, {"train": [21], "val": [4], "test": [9]}, baked=40)
    with pytest.raises(UseError, match=r"/run: trained on what .*/set was before"):
        list(finish_runs([recipe, small(shards, tmp_path / "other")], 1, "runs"))


@pytest.mark.launch
def test_where_the_caller_stops_no_further_run_begins(shards: Path, tmp_path: Path) -> None:
    recipes = [small(shards, tmp_path / name) for name in ("a", "b", "c", "d")]
    runs = finish_runs(recipes, 1, "runs")
    assert next(runs) is recipes[0]
    runs.close()
    begun = [name for name in "abcd" if (tmp_path / name / "recipe.yaml").exists()]
    assert begun in (["a"], ["a", "b"])  # the one under way is finished
    assert all((tmp_path / name / "summary.json").exists() for name in begun)


def test_a_set_without_a_test_split_is_refused_before_anything_is_trained(
    shard_set: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = small(shard_set({"train": [8]}, "untested", baked=40), tmp_path / "run")
    with pytest.raises(UseError, match="untested: no test split, so its runs would have no accuracy to compare"):
        list(finish_runs([recipe], 1, "runs"))
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_a_run_that_fails_or_is_killed_stops_no_other(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = small(shards, tmp_path / "bad", "--model.weights", str(tmp_path / "none.safetensors"))
    good = small(shards, tmp_path / "good")
    finished = []
    with pytest.raises(WorkError, match=r"1 of 2 runs failed.*none\.safetensors"):
        for recipe in finish_runs([bad, good], 1, "runs"):
            finished.append(recipe.train.run)
    assert (tmp_path / "good/summary.json").exists() and finished == [good.train.run]

    # Killed in its first step, then tried again: the same command finishes it.
    start = subprocess.Popen

    def start_and_kill(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        process = start(*arguments, **options)
        process.send_signal(signal.SIGKILL)
        return process

    killed = small(shards, tmp_path / "killed")
    monkeypatch.setattr(subprocess, "Popen", start_and_kill)
    with pytest.raises(WorkError, match=r"killed: its process ended with status -9; see .*worker-0\.log"):
        list(finish_runs([killed], 1, "runs"))
    monkeypatch.undo()
    assert len(list(finish_runs([killed], 1, "runs"))) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--optim.schedule cosine --optim.warmup_steps 5", "batch size 8: optim.warmup_steps 5 leaves nothing of the "),
        ("--data.shards nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_measured(
    shards: Path, tmp_path: Path, results: Path, capsys: Any, more: str, said: str
) -> None:
    recipe = f"{SMALL} --data.shards {shards} --train.run {tmp_path / 'runs'} --train.epochs 2 {more}"
    assert main(["batch_size", "--name", "s", "--batches", "4,8", "--accuracy", *recipe.split()]) == 2
    assert said in capsys.readouterr().err
    assert not results.exists()


@pytest.mark.launch
def test_a_sweep_over_batch_sizes(shards: Path, tmp_path: Path, results: Path, capsys: Any) -> None:
    recipe = f"{SMALL} --data.shards {shards} --train.run {tmp_path / 'runs'} --train.epochs 2"
    sweep = "batch_size --name s --heads cls --batches 4,8 --micro-batch 4 --warmup 1 --steps 3 --price-per-hour 2"
    command = [*sweep.split(), "--accuracy", *recipe.split()]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 of 3 points to measure" in said and "one seed decides nothing" in said
    document = json.loads((results / "batch_size/s.json").read_bytes())
    rows = document["rows"]
    assert [(row["batch_size"], row["micro_batch"], row["accumulation"]) for row in rows] == [
        (4, 4, 1),
        (8, 8, 1),
        (8, 4, 2),
    ]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(1000 * row["batch_size"] / row["step_ms"], rel=0.01)
        assert row["epoch_minutes"] == pytest.approx(20 / row["images_per_s"] / 60, abs=6e-4)
        assert row["train_price"] == pytest.approx(row["train_minutes"] / 60 * 2, abs=1e-4)
        summaries = [
            json.loads(path.read_bytes())
            for path in (tmp_path / "runs").glob("*/summary.json")
            if f"batch{row['batch_size']}" in str(path)
        ]
        assert [row["top1"]] == [summary["evaluations"]["test"]["top1"] for summary in summaries]
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 2  # accumulation changes nothing in what is learnt
    assert sum(row["recommended"] for row in rows) == 1

    assert main(command) == 0  # goes on, and nothing is left
    assert "0 of 3 points to measure" in capsys.readouterr().out
    assert json.loads((results / "batch_size/s.json").read_bytes())["rows"] == rows


def test_seeds_are_added_to_a_result_and_nothing_is_measured_anew(
    shards: Path, tmp_path: Path, results: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with trainings and steps that take no time; those of one seed come before those of the next."""
    measured: list[int] = []
    trained: list[tuple[str, int]] = []

    def measure(recipe: Recipe, arm: str, *_: Any) -> dict[str, Any]:
        assert arm == "end_to_end"  # what it trains on is there
        measured.append(recipe.train.batch_size)
        rate = {"images_per_s": 10.0 * recipe.train.batch_size, "memory_mb": 100.0, "joules_per_image": 7.2}
        return {"step_ms": 100.0, "step_ms_p95": 110.0, "data_wait_share": 0.25} | rate

    def finish(recipes: list[Recipe], *_: Any) -> Iterator[Recipe]:
        for recipe in recipes:
            trained.append((Path(recipe.train.run).name, recipe.train.seed))
            yield recipe

    monkeypatch.setattr(sweep.step, "measure", measure)
    monkeypatch.setattr(runs, "finish_runs", finish)
    monkeypatch.setattr(runs, "test_evaluation", lambda recipe: {"top1": 0.5 + recipe.train.seed / 10})
    monkeypatch.setattr(runs, "trained_at", lambda recipe: "abc1234")
    recipe = f"{SMALL} --data.shards {shards} --train.run {tmp_path / 'runs'} --train.epochs 2 --train.seed 1"
    command = ["batch_size", "--name", "s", "--heads", "cls", "--batches", "4,8", "--accuracy", *recipe.split()]
    assert main(command) == 0 and "one seed decides nothing" in capsys.readouterr().out
    trained.clear()

    assert main([*command, "--seeds", "3"]) == 0
    said = capsys.readouterr().out
    assert "0 of 2 points to measure" in said and measured == [4, 8]
    assert "3 seeds are few" in said and "batch 8 is recommended in 60 % of resamples of the 3 seeds" in said
    assert f"on one page: {results / 'batch_size/s.html'}" in said and (results / "batch_size/s.html").is_file()
    name = "vit_tiny_patch16-cls-32px-batch"
    assert trained == [(f"{name}{b}{more}", s) for more, s in (("", 1), ("-seed1", 2), ("-seed2", 3)) for b in (4, 8)]
    for row in json.loads((results / "batch_size/s.json").read_bytes())["rows"]:
        assert row["top1_by_seed"] == pytest.approx([0.6, 0.7, 0.8]) and row["top1"] == pytest.approx(0.7)
        assert row["top1_error"] == pytest.approx(0.1 / 3**0.5) and row["seeds"] == 3
        assert row["data_wait_share"] == 0.25 and row["trained_at"] == "abc1234"
        assert row["train_wh"] == pytest.approx(7.2 * 20 * 2 / 3600)  # 20 samples, two epochs


def test_a_memory_limit_makes_running_out_of_memory_a_result() -> None:
    recipe, _ = parse_recipe(["--data.image_size", "256", "--train.batch_size", "8000"])  # 6.3 GB of images
    assert measure(recipe, "synthetic", 0, 1, {}, 5_000_000_000)["out_of_memory"] is True


@given(st.integers(1, 600))
def test_sizes_to_search_lie_an_eighth_apart(most: int) -> None:
    sizes = fit.sizes_to(most)
    assert sizes[0] == 1 and sizes[-1] == most
    assert all(one < other <= one + max(1, one // 8) for one, other in itertools.pairwise(sizes))


def test_the_search_begins_at_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's process goes on after a size that did not fit; a CPU's is ended by the system, so each size has one."""
    recipe, _ = parse_recipe([*SMALL.split(), "--model.compile", "graphs", "--train.micro_batch_size", "4"])
    tried: list[Recipe] = []

    def steps_fit(recipe: Recipe, *_: Any) -> bool:
        tried.append(recipe)
        return recipe.train.batch_size <= 40

    def predict_step(recipe: Recipe, *_: Any) -> Any:
        return SimpleNamespace(peak_mb=recipe.train.batch_size)

    monkeypatch.setattr("benchmarks.speed.memory.limit_memory", lambda limit: None)  # of this process
    monkeypatch.setattr(memory, "predict_step", predict_step)
    monkeypatch.setattr(micro_batch, "steps_fit", steps_fit)
    assert fit.search_here({"recipe": asdict(recipe), "most": 64, "memory_limit": 45_000_000}) == 40
    assert [recipe.train.batch_size for recipe in tried] == [44, 40]
    assert {recipe.train.micro_batch_size for recipe in tried} == {0}

    def measure(tried: Recipe, arm: str, warmup: int, steps: int, memory_limit: int) -> dict[str, Any]:
        assert (arm, warmup, steps) == ("synthetic", 0, 2)
        # By PyTorch's own operators: nothing is compiled for each size.
        assert tried.model.compile == "none"
        return {"out_of_memory": True if tried.train.batch_size > 40 else 3}

    if not torch.cuda.is_available():
        monkeypatch.setattr(fit, "measure", measure)
        assert fit.largest_micro_batch(recipe, 64, 30_000_000) == 40


@pytest.mark.launch
def test_sizes_are_tried_by_steps_one_after_the_other_in_one_process() -> None:
    recipe, _ = parse_recipe(SMALL.split())
    point = {"recipe": asdict(recipe), "most": 32, "memory_limit": 0}
    assert points.run_point("benchmarks.speed.fit:search_here", point) == 32


def test_each_batch_is_measured_in_each_mode_and_trained_in_the_fastest() -> None:
    swept = Arguments("s", "vit_tiny_patch16", "cls", "16,32", compile="none,graphs")
    recipes = list(sweep.points(Recipe(), swept))
    assert [(r.train.batch_size, r.model.compile) for r in recipes] == [
        (16, "none"),
        (16, "graphs"),
        (32, "none"),
        (32, "graphs"),
    ]
    rows = [sweep.describe(recipe) for recipe in recipes]
    assert len({sweep.key_of(row) for row in rows}) == 4
    assert Recipe().deepspeed.precision == "auto" and rows[0]["precision"] == precision_of(Recipe().deepspeed)
    for row, ms in zip(rows, (9.0, 2.0, 10.0, 11.0), strict=True):
        row["step_ms"] = ms
    assert sweep.recipes_to_train(recipes, rows) == [recipes[1], recipes[2]]
    table = tables_of(benchmark_of("batch_size"), {"rows": rows})[0]
    assert [line[table.headings.index("compiled")] for line in table.cells] == ["none", "graphs"] * 2


def test_the_plan_counts_a_training_once_however_its_batch_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meters, "matmul_rate", lambda *_: 1e12)
    base = parse_recipe([*SMALL.split(), "--data.shards", "nowhere"])[0]
    samples = sweep.samples_per_epoch(base)
    assert samples == 322_947
    assert "nowhere: no such shard set" in capsys.readouterr().out  # and not in silence

    def hours(seeds: int = 1, jobs: int = 1, **ways: Any) -> float:
        swept = Arguments("s", heads="cls", batches="16,32", accuracy=True, seeds=seeds, jobs=jobs, **ways)
        recipes = list(sweep.points(base, swept))
        said = sweep.describe_plan(recipes, len(recipes), swept, 100 * samples)
        return float(said.partition("about ")[2].partition(" about ")[2].partition(" hours")[0])

    once = hours(compile="none")
    assert once > 1 and hours(compile="none,kernels") == once
    assert hours(compile="none", micro_batch=8) == once
    assert hours(compile="none", seeds=4, jobs=4) == once


def test_a_begun_result_that_cannot_be_read_is_one_clear_line(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "batch_size").mkdir(parents=True)
    for content, said in (('{"rows": [', "not JSON"), ("{}", "not a benchmark result")):
        (results / "batch_size/s.json").write_text(content)
        assert main(["batch_size", "--name", "s", "--batches", "4"]) == 1
        assert f"batch_size/s.json: {said}" in capsys.readouterr().err
        assert (results / "batch_size/s.json").read_text() == content


def test_a_mode_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["batch_size", "--name", "a", "--compile", "none,fast"]) == 2
    assert "--compile: no 'fast'; there are none, kernels, graphs" in capsys.readouterr().err
    assert main(["batch_size", "--name", "a", "--seeds", "2"]) == 2
    assert "--seeds 2: a number of trainings, with --accuracy" in capsys.readouterr().err


def test_the_largest_micro_batch_is_searched_once_for_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def search(recipe: Recipe, *_: Any) -> int:
        searched.append(recipe.model.head)
        return {"cls": 48, "ifa": 32}[recipe.model.head]

    monkeypatch.setattr(sweep, "largest_micro_batch", search)
    swept = Arguments("s", "vit_tiny_patch16", batches="16,64", compile="none", micro_batch=16, search=64)
    recipes = list(sweep.points(Recipe(), swept))
    rows = [sweep.describe(recipe) for recipe in recipes]
    for _ in range(2):  # the second time all is known
        list(sweep.search_micro_batches(rows, recipes, swept))
    assert searched == ["cls", "ifa"]
    assert {(row["head"], row["largest_micro_batch"]) for row in rows} == {("cls", 48), ("ifa", 32)}


POINTS = st.lists(
    st.fixed_dictionaries({"train_minutes": st.integers(1, 9), "top1": st.integers(0, 9).map(lambda n: n / 10)}),
    min_size=1,
    max_size=8,
)


@given(POINTS, st.sampled_from([0.0, 5.0, 10.0, 30.0]))
def test_the_front_is_what_no_point_beats(rows: list[dict[str, Any]], tolerance: float) -> None:
    for number, row in enumerate(rows):
        row["batch_size"] = number
    mark(rows, tolerance, 10)
    for row in rows:
        beaten = any(
            (other["train_minutes"] < row["train_minutes"] and other["top1"] >= row["top1"])
            or (other["train_minutes"] <= row["train_minutes"] and other["top1"] > row["top1"])
            for other in rows
        )
        assert row["pareto"] is not beaten
    (recommended,) = [row for row in rows if row["recommended"]]
    good_enough = [row for row in rows if 100 * row["top1"] >= 100 * max(r["top1"] for r in rows) - tolerance]
    assert recommended in good_enough
    assert recommended["train_minutes"] == min(row["train_minutes"] for row in good_enough)
