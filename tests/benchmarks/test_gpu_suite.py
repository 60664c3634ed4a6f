"""The GPU suite, small, on the device there is: its rows; cut off and gone on with; out of time; broken points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.points import Child
from benchmarks.speed import gpu, gpu_checks, gpu_child, gpu_loader, gpu_plan, gpu_steps
from benchmarks.speed.gpu_plan import FULL, PRODUCTS, RUN, SMOKE, Point, plan
from benchmarks.speed.gpu_targets import targets
from dist_train.config import OptimConfig
from dist_train.train import graphs
from tests.harness import REPOSITORY
from tests.train.recording import record

CHECKS = [
    "check: loss and gradient against float64 on the CPU",
    "check: pixels of the device's pipeline against the CPU's",
    "check: fp16 with ZeRO 1 trains",
    "check: a CUDA graph trains as its kernels do",
    PRODUCTS,
    RUN,
]
ROWS = [
    *CHECKS,
    "step: vit_tiny_patch8 cls batch 8, bf16_autocast",
    "step: vit_tiny_patch16 cls batch 8, bf16_autocast",
    "loader: on the GPU, batch 8",
    "step: vit_tiny_patch8 cls batch 8, bf16_autocast, compiled",
    "step: vit_tiny_patch16 cls batch 4, bf16_autocast",
    "step: vit_tiny_patch8 cls batch 4, bf16_autocast",
    "step: vit_tiny_patch16 cls batch 8, bf16_autocast, 8 text tokens",
    "step: vit_tiny_patch8 cls batch 8, bf16, ZeRO 1",
    "loader: on the CPU, batch 8",
]
NEED_A_GPU = [CHECKS[2], CHECKS[3], ROWS[8], ROWS[9]]


def read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / "gpu" / f"{name}.json").read_bytes())


def measured_by(monkeypatch: pytest.MonkeyPatch, measure: Callable[[str, dict[str, Any]], gpu.Row]) -> None:
    """Let a function of kind and arguments measure, in place of a process."""
    monkeypatch.setattr(gpu, "ask", lambda _, kind, arguments, limit: measure(kind, arguments))


@pytest.mark.slow
def test_a_suite_that_is_killed_keeps_its_rows_and_the_same_command_measures_the_others(results: Path) -> None:
    command = [str(REPOSITORY / "benchmarks/gpu_suite.sh"), "--smoke", "--name", "cut", "--results", str(results)]
    command += ["--shards", str(results / "shards"), "--budget", "3000"]  # enough however busy the machine is
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as suite:
        assert suite.stdout.readline().startswith(f"{CHECKS[0]}: ")  # printed when the row is on the disk
        measuring = psutil.Process(suite.pid).children(recursive=True)
        os.kill(suite.pid, signal.SIGKILL)
        assert measuring and not psutil.wait_procs(measuring, timeout=60)[1]  # else the next suite would not be alone
    before = read(results, "cut")["rows"]
    assert [row["what"] for row in before] == CHECKS[:1]

    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    document = read(results, "cut")
    rows = {row["what"]: row for row in document["rows"]}
    assert done.returncode == 0, done.stdout
    assert list(rows) == ROWS
    assert rows[CHECKS[0]] == before[0]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{CHECKS[0]}: kept from before"
    names = [*ROWS, *(target["what"] for target in document["targets"])]
    assert all(line.startswith(f"{what}: ") for line, what in zip(lines, names, strict=True))

    assert not [row for row in rows.values() if "error" in row]
    skipped = [] if torch.cuda.is_available() else NEED_A_GPU
    assert [row["what"] for row in rows.values() if "skipped" in row] == skipped
    assert all(rows[what]["skipped"] == "needs a GPU" for what in skipped)
    assert all(rows[what]["met"] for what in CHECKS if what not in skipped)
    assert rows[RUN]["steps"] == 14 and rows[RUN]["evaluated_top1"] == pytest.approx(rows[RUN]["test_top1"])
    alone, beside = rows[ROWS[10]], rows[ROWS[7]]
    assert alone["precision"] == "bf16_autocast" and alone["batch_size"] == 4 and alone["images_per_s"] > 0
    assert beside["compile"] == "none" and beside["matrix_products"] == "bf16 in 100 % of matrix products"
    assert beside["over_bare"] > 0 and beside["bare_memory_mb"] > 0
    assert 0 < beside["ifa_over_cls_lowest"] <= beside["ifa_over_cls"] <= beside["ifa_over_cls_highest"]
    assert 0 < beside["data_wait_share"] < 1 and beside["over_model"] > 0
    assert rows[ROWS[14]]["decoder"] == "cpu" and rows[ROWS[14]]["over_dali"] > 0
    assert rows[ROWS[12]]["text_tokens"] == 8 and rows[ROWS[13]]["zero_stage"] == 1
    assert document["command"] == "benchmarks/gpu_suite.sh --smoke --name cut"
    assert not (REPOSITORY / "benchmarks/results/gpu/cut.json").exists()


@pytest.mark.parametrize(("given", "seconds"), [("0100", 100), ("080", 80)])
def test_a_budget_is_in_decimal(given: str, seconds: int, results: Path) -> None:
    results.mkdir()
    (results / "manifest.json").touch()
    command = [str(REPOSITORY / "benchmarks/gpu_suite.sh"), "--shards", str(results), "--budget", given]
    said = subprocess.run(command, env=os.environ | {"PYTHON": "echo"}, capture_output=True, text=True, check=True)
    assert seconds - 5 <= int(said.stdout.split("--budget ")[1]) <= seconds


def test_the_interpreter_may_be_named_from_where_the_user_is(results: Path, tmp_path: Path) -> None:
    results.mkdir()
    (results / "manifest.json").touch()
    (tmp_path / "own").write_text('#!/bin/sh\necho "$0"\n')
    (tmp_path / "own").chmod(0o755)
    (tmp_path / "link").symlink_to("own")
    command = [str(REPOSITORY / "benchmarks/gpu_suite.sh"), "--shards", str(results)]
    environment = os.environ | {"PYTHON": "./link"}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == f"{tmp_path / 'link'}\n"


def test_without_time_every_point_is_a_row_that_says_so(results: Path) -> None:
    assert main(["gpu", "--smoke", "--shards", "none", "--name", "a", "--budget", "0", "--results", str(results)]) == 0
    document = read(results, "a")
    assert [row["what"] for row in document["rows"]] == ROWS
    assert {row["skipped"] for row in document["rows"]} <= {"out of time", "needs a GPU"}
    assert {(row["value"], row["met"]) for row in document["targets"]} == {(None, None)}


def test_a_broken_point_is_a_row_with_its_error_and_the_suite_goes_on(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "plan", lambda *scale: [p for p in plan(*scale) if p.kind in ("pixels", "loader")])
    arguments = ["--smoke", "--shards", str(tmp_path / "none"), "--name", "b", "--results", str(results)]
    assert main(["gpu", *arguments]) == 1
    rows = {row["what"]: row for row in read(results, "b")["rows"]}
    for what in (CHECKS[1], "loader: on the CPU, batch 8"):
        assert f"{tmp_path / 'none'}: no such shard set" in rows[what]["error"] and "\n" not in rows[what]["error"]
    assert f"{CHECKS[1]}: error" in capfd.readouterr().out


def test_the_exit_status_tells_failed_checks_from_other_failures(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--shards", "none", "--results", str(results)]
    measured_by(monkeypatch, lambda kind, _: {"met": kind != "pixels"})
    assert main(["gpu", *arguments, "--name", "wrong"]) == 1
    measured_by(monkeypatch, lambda kind, _: {"out_of_memory": True} if kind == "loss" else {"met": True})
    assert main(["gpu", *arguments, "--name", "large"]) == 1
    assert f"1 of 6 checks failed: {CHECKS[0]}" in capfd.readouterr().err
    broken = {"error": "broken"}
    measured_by(monkeypatch, lambda kind, _: broken if kind in ("steps", "loader") else {"met": True})
    assert main(["gpu", *arguments, "--name", "slow"]) == 0
    assert [row for row in read(results, "slow")["rows"] if "error" in row]
    if not torch.cuda.is_available():
        assert main(["gpu", "--shards", "none"]) == 2
        assert "--smoke runs the suite with small models on the CPU" in capfd.readouterr().err


def test_a_point_is_skipped_where_it_may_take_longer_than_there_is_time() -> None:
    asked = []

    def measure(point: Point, limit: float) -> gpu.Row:
        asked.append(point.what)
        if point.kind == "hangs":
            raise TimeoutError
        time.sleep(0.6)
        return {"figure": 1}

    kept = [{"what": "z", "figure": 2, "seconds": 0.001}, {"what": "d", "error": "an earlier one"}]
    kinds = {"z": "quick", "a": "slow", "b": "slow", "c": "other", "d": "quick"}
    # What was measured counts more than what was expected: b takes as long as a did, d as z.
    expected = {"z": 0, "a": 0, "b": 0, "c": 0.9, "d": 0.9}
    points = [Point(what, kind, {}, expected[what], similar=kind) for what, kind in kinds.items()]
    written: list[list[gpu.Row]] = []
    rows = gpu.run_points(points, kept, time.monotonic() + 1, False, measure, lambda rows: written.append(rows))
    assert asked == ["a", "d"]
    assert rows[0] is kept[0] and rows[1]["figure"] == 1 and rows[1]["seconds"] >= 0.6
    assert [row.get("skipped") for row in rows] == [None, None, "out of time", "out of time", None]
    assert [len(now) for now in written] == [2, 3, 4, 5] and written[-1] == rows

    hang = [Point("h", "hangs", {}, 0)]
    assert gpu.run_points(hang, [], time.monotonic() + 1, False, measure, written.append) == [
        {"what": "h", "skipped": "out of time"}
    ]
    (row,) = gpu.run_points(hang, [], time.monotonic() + 1000, False, measure, written.append)
    assert row["error"] == f"no result after {gpu.POINT_LIMIT_S:g} s"


def test_a_point_that_runs_ahead_is_waited_for_in_its_turn_before_anything_is_timed() -> None:
    begun, order = threading.Event(), []

    def measure(point: Point, limit: float) -> gpu.Row:
        if point.ahead:
            begun.set()
        else:
            assert begun.wait(60)
        order.append(point.what)
        return {}

    points = [Point("check", "a", {}), Point("run", "b", {}, ahead=True), Point("timed", "c", {})]
    rows = gpu.run_points(points, [], time.monotonic() + 1000, False, measure, lambda rows: None)
    assert [row["what"] for row in rows] == ["check", "run", "timed"]
    assert sorted(order[:2]) == ["check", "run"] and order[2] == "timed"


def test_a_process_that_hangs_or_dies_is_replaced_and_one_that_refuses_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = {"shards": str(tmp_path / "none"), "batch": 2, "image_size": 32, "crop_margin": 8}

    def pixels(child: Child) -> str:
        return gpu.ask(child, "pixels", nowhere, 300)["error"]

    with gpu.new_child() as child:
        with pytest.raises(TimeoutError):
            gpu.ask(child, "loss", {}, 0.2)
        assert "none: no such shard set" in pixels(child)
        first = child.process
        assert "none: no such shard set" in pixels(child)
        assert child.process is first

        assert gpu.ask(child, "training", {"precision": "no such", "zero_stage": 0, "steps": 1}, 300)["error"]
        assert "Traceback" in capfd.readouterr().err
        assert "none: no such shard set" in pixels(child)
        second = child.process
        assert second is not first and second is not None

        second.kill()
        second.wait()
        assert "none: no such shard set" in pixels(child)
        assert child.process is not None
        os.kill(child.process.pid, signal.SIGSTOP)  # it will not answer, and is killed while it is asked
        threading.Timer(0.2, child.process.kill).start()
        assert pixels(child) == "ended by signal 9"
    assert child.process is None


def test_a_point_without_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(point: gpu.Row) -> gpu.Row:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_child, "measure_kind", too_much)
    row = gpu_child.measure({"kind": "steps"})
    assert row["out_of_memory"] is True


def test_the_full_plan_names_every_point_once_and_has_what_the_issue_asks_for() -> None:
    points = plan(FULL, "set")
    whats = [point.what for point in points]
    assert len(set(whats)) == len(whats) and whats[: len(CHECKS)] == CHECKS
    # All fit into the time; those that run ahead take it at once.
    ahead = [point for point in points if point.ahead]
    alone = sum(point.seconds for point in points if not point.ahead)
    assert alone + max(point.seconds for point in ahead) <= gpu.BUDGET_S == 480
    # What is compiled is compiled before anything is timed.
    timed_points = [point for point in points if point.what.startswith("step: ")]
    assert all(points.index(point) < points.index(timed_points[0]) for point in ahead)
    compiled = [arguments for point in ahead for arguments in point.arguments.get("points", [])]
    assert all(point.arguments in compiled for point in timed_points if point.what.endswith("compiled"))
    assert max(point.seconds for point in points) < gpu.POINT_LIMIT_S
    by_what = {point.what: point.arguments for point in points}
    for backbone in ("vit_large_patch16", "vit_base_patch16"):
        curve = [f"step: {backbone} cls batch {batch}, bf16_autocast" for batch in (16, 32, 64, 128, 256)]
        assert all(by_what[what]["record"] for what in curve)
        for what in (curve[-1], f"{curve[-1]}, compiled"):
            assert by_what[what]["ifa"] and "bare" in by_what[what]["bare"]
        assert by_what[f"{curve[-1]}, compiled"]["loaded"] and f"step: {backbone} cls batch 256, bf16, ZeRO 1" in whats
    assert by_what["step: vit_base_patch16 cls batch 16, bf16_autocast, compiled"]["bare"] == {
        "bare_graphs": ("autocast", "reduce-overhead")
    }
    assert "bare_pure" in by_what["step: vit_large_patch16 cls batch 256, bf16, compiled"]["bare"]
    assert {
        "step: vit_base_patch16 cls batch 256, bf16_autocast, 32 text tokens",
        "step: vit_base_patch16 cls batch 256, bf16",
        "loader: on the GPU, batch 256",
    } < set(whats)
    # ZeRO 3 changes torch for the whole process.
    assert all(point.arguments["recipe"]["deepspeed"]["zero_stage"] < 3 for point in points if point.kind == "steps")
    assert all(point.kind in gpu_child.KINDS for point in points)
    assert [point.what for point in plan(SMOKE, "set") if point.smoke] == ROWS


def test_the_targets_are_computed_from_the_rows() -> None:
    large = {"what": "a", "backbone": "vit_large_patch16", "batch_size": 256}
    base = {"what": "b", "backbone": "vit_base_patch16", "batch_size": 256}
    eager, compiled = {"compile": "none"}, {"compile": "kernels"}
    rows = [
        {"what": "a", "error": "broken"},
        large | {"out_of_memory": True},
        large | eager | {"mfu_of_matmul": 0.5, "memory_over_bare": 1.2, "over_bare": 9.0, "ifa_over_cls": 1.004},
        large | compiled | {"mfu_of_matmul": 0.6, "over_bare": 1.02, "ifa_over_cls": 1.02, "over_model": 1.01},
        large | compiled | {"over_bare": 1.05, "batch_size": 128, "mfu_of_matmul": 0.9, "ifa_over_cls": 1.5},
        base | compiled | {"over_bare": 1.04, "over_model": 1.03, "data_wait_share": 0.002, "left_mb": 3.0},
        base | compiled | {"ifa_over_cls_graphs": 1.001},
        base | compiled | {"batch_size": 16, "graphs_images_per_s": 3400.0, "left_mb": 40.0},
        base | eager | {"over_model": 2.0, "data_wait_share": 0.02, "ifa_over_cls_in_bdl": 0.9},
        {"what": "loader", "data_device": "gpu", "over_dali": 1.2, "cpu_over_dali": 0.8},
        {"what": "loader", "data_device": "gpu", "over_dali": 0.9, "cpu_over_dali": None},
        {"what": "loader", "data_device": "cpu", "over_dali": 0.1, "first_batch_s": 7.0},
        {"what": RUN, "first_batch_s": 0.6},
        {"what": PRODUCTS, "cls_bf16": 1.0, "vilt_bf16_autocast": 0.98},
    ]
    found = [(row["value"], row["limit"], row["met"]) for row in targets(rows, FULL)]
    assert found == [
        (0.6, 0.55, True),
        (1.02, 1.03, True),
        (1.04, 1.03, False),
        (3400.0, 3300, True),
        (1.2, 1.1, False),
        (0.004, 0.005, True),
        (0.02, 0.005, False),
        (None, 0.005, None),
        (None, 0.005, None),
        (None, 0.005, None),
        (0.001, 0.005, True),
        (0.9, 1.0, True),
        (0.9, 1.0, False),
        (0.8, 1.0, True),
        (1.01, 1.02, True),
        (1.03, 1.04, True),
        (0.02, 0.01, False),
        (0.6, 0.5, False),
        (0.98, 1.0, False),
        (40.0, 16.0, False),
    ]


def test_what_only_a_gpu_is_asked_for_is_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = gpu_checks.check_training({"precision": "bf16", "zero_stage": 1, "steps": 3})
    assert row["met"] and row["loss_2"] < row["loss_0"]
    assert 0 < gpu_loader.decoder(on_gpu=True)["hw_decoder_load"] <= 1
    with gpu_loader.JpegEngine(watch=True) as jpeg:
        pass
    assert jpeg.highest is None or 0 <= jpeg.highest <= 100
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs, "record", record)  # as a graph does
    row = gpu_checks.check_graphs({"steps": 4})
    assert row["met"] and row["loss_last"] != row["loss_first"]


def test_steps_that_learn_nothing_are_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_checks.small_recipe
    monkeypatch.setattr(gpu_checks, "small_recipe", lambda *asked: replace(made(*asked), optim=OptimConfig(lr=0.0)))
    assert not gpu_checks.check_training({"precision": "float32", "zero_stage": 0, "steps": 2})["met"]


def test_a_graph_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
        _, loss = record(run, device)
        return lambda: None, loss  # nothing is computed again

    monkeypatch.setattr(graphs, "record", wrong)
    assert gpu_checks.check_graphs({"steps": 4})["met"] is False


def test_the_compiled_and_graphed_step_of_a_point_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiler and the recording left out: what they make is PyTorch's own."""
    monkeypatch.setattr(graphs, "record", record)
    own = gpu_steps.OwnStep(
        gpu_plan.recipe_of(SMOKE, gpu_plan.ModelConfig("vit_tiny_patch16", compile="none"), 4, "bf16", 0, ""),
        gpu_steps.init_process_group(),
        11,
    )
    batches = iter([gpu_steps.synthetic_batch(own.recipe, 4, 11, own.device)] * 6)
    losses = [float(own(batches)) for _ in range(3)]
    own.record()
    assert own.products == "bf16 in 100 % of matrix products"
    losses += [float(own(batches)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and own.train_step.graphs
