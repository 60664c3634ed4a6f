"""The GPU suite, small, on the device there is: its rows; cut off and gone on with; out of time; broken points."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_points, result
from tests.conftest import REPOSITORY

CHECKS = [
    "check: loss and gradient against float64 on the CPU",
    "check: pixels of the device's pipeline against the CPU's",
    "check: fp16 with ZeRO 1 trains",
]
NEED_A_GPU = [CHECKS[2], "step: vit_tiny_patch8 cls batch 8, compiled", "loader: on the GPU, batch 8"]
ROWS = [
    *CHECKS,
    "step: vit_tiny_patch8 cls batch 8",
    "step: vit_tiny_patch8 cls batch 8, compiled",
    "IFA beside CLS: vit_tiny_patch16 batch 8",
    "end to end: vit_tiny_patch8 cls batch 8",
    "loader: on the GPU, batch 8",
    "loader: on the CPU, batch 8",
    "step: vit_tiny_patch16 cls batch 8, 8 text tokens",
    "step: vit_tiny_patch16 cls batch 4",
]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def read(results: Path, name: str) -> dict[str, Any]:
    return json.loads((results / "gpu" / f"{name}.json").read_bytes())


def test_a_suite_that_is_killed_keeps_its_rows_and_the_same_command_measures_the_others(results: Path) -> None:
    command = [str(REPOSITORY / "benchmarks/gpu_suite.sh"), "--smoke", "--name", "cut", "--results", str(results)]
    command += ["--shards", str(results / "shards"), "--budget", "3000"]  # enough however busy the machine is
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as suite:
        assert suite.stdout.readline().startswith(f"{CHECKS[0]}: ")  # printed when the row is on the disk
        os.killpg(suite.pid, signal.SIGKILL)
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
    step, pairs = rows[ROWS[3]], rows[ROWS[5]]
    assert step["precision"] == "bf16" and step["batch_size"] == 8 and step["images_per_s"] > 0
    assert 0 < pairs["time_over_cls_lowest"] <= pairs["time_over_cls"] <= pairs["time_over_cls_highest"]
    assert 0 < rows["end to end: vit_tiny_patch8 cls batch 8"]["data_wait_share"] < 1
    assert rows["loader: on the CPU, batch 8"]["decoder"] == "cpu"
    assert rows["step: vit_tiny_patch16 cls batch 8, 8 text tokens"]["text_tokens"] == 8
    assert [row["value"] is None for row in document["targets"]] == [False] * 4
    assert document["command"] == "benchmarks/gpu_suite.sh --smoke --name cut"
    assert not (REPOSITORY / "benchmarks/results/gpu/cut.json").exists()


def test_without_time_every_point_is_a_row_that_says_so(results: Path) -> None:
    assert gpu.main(["--smoke", "--shards", "none", "--name", "a", "--budget", "0", "--results", str(results)]) == 0
    document = read(results, "a")
    assert [row["what"] for row in document["rows"]] == ROWS
    assert {row["skipped"] for row in document["rows"]} <= {"out of time", "needs a GPU"}
    assert [(row["value"], row["met"]) for row in document["targets"]] == [(None, None)] * 4


def test_a_broken_point_is_a_row_with_its_error_and_the_suite_goes_on(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole_plan = gpu.plan
    monkeypatch.setattr(gpu, "plan", lambda *scale: [p for p in whole_plan(*scale) if p.kind in ("pixels", "loader")])
    arguments = ["--smoke", "--shards", str(tmp_path / "none"), "--name", "b", "--results", str(results)]
    assert gpu.main(arguments) == 1
    rows = {row["what"]: row for row in read(results, "b")["rows"]}
    for what in (CHECKS[1], "loader: on the CPU, batch 8"):
        assert f"{tmp_path / 'none'}: no such shard set" in rows[what]["error"] and "\n" not in rows[what]["error"]
    assert f"{CHECKS[1]}: error" in capfd.readouterr().out


def test_the_exit_status_tells_failed_checks_from_other_failures(
    results: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--shards", "none", "--results", str(results)]
    monkeypatch.setattr(gpu, "measure_in_process", lambda point, _: {"met": point.kind != "pixels"})
    assert gpu.main([*arguments, "--name", "wrong"]) == 1
    broken = {"error": "broken"}
    monkeypatch.setattr(gpu, "measure_in_process", lambda point, _: {"met": True} if "check" in point.what else broken)
    assert gpu.main([*arguments, "--name", "slow"]) == 0
    assert [row for row in read(results, "slow")["rows"] if "error" in row]
    if not torch.cuda.is_available():
        assert gpu.main(["--shards", "none"]) == 2
        assert "--smoke runs the suite with small models on the CPU" in capfd.readouterr().err


def test_a_point_is_skipped_where_one_like_it_took_longer_than_there_is_time() -> None:
    asked = []

    def measure(point: gpu.Point, limit: float) -> gpu.Row:
        asked.append(point.what)
        if point.kind == "hangs":
            raise TimeoutError
        time.sleep(0.6)
        return {"figure": 1}

    kept = [{"what": "z", "figure": 2, "seconds": 0.001}, {"what": "d", "error": "an earlier one"}]
    kinds = {"z": "quick", "a": "slow", "b": "slow", "c": "other", "d": "quick"}
    points = [gpu.Point(what, kind, {}) for what, kind in kinds.items()]
    written: list[list[gpu.Row]] = []
    rows = gpu.run_points(points, kept, time.monotonic() + 1, False, measure, lambda rows: written.append(rows))
    assert asked == ["a", "d"]  # for c there is nothing like it to go by
    assert rows[0] is kept[0] and rows[1]["figure"] == 1 and rows[1]["seconds"] >= 0.6
    assert [row.get("skipped") for row in rows] == [None, None, "out of time", "out of time", None]
    assert [len(now) for now in written] == [2, 3, 4, 5] and written[-1] == rows

    hang = [gpu.Point("h", "hangs", {})]
    assert gpu.run_points(hang, [], time.monotonic() + 1, False, measure, written.append) == [
        {"what": "h", "skipped": "out of time"}
    ]
    (row,) = gpu.run_points(hang, [], time.monotonic() + 1000, False, measure, written.append)
    assert row["error"] == "no result after 150 s"


def test_a_point_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError):
        gpu.measure_in_process(gpu.Point("a", "loss", {}), 0.2)


def test_the_full_plan_names_every_point_once_and_has_what_the_issue_asks_for() -> None:
    points = gpu.plan(gpu.FULL, "set")
    whats = [point.what for point in points]
    assert len(set(whats)) == len(whats) and whats[:3] == CHECKS
    assert len(points) <= 25  # of some 15 to 20 s
    for backbone in ("vit_large_patch16", "vit_base_patch16"):
        assert {f"step: {backbone} cls batch {batch}" for batch in (16, 32, 64, 128, 256)} < set(whats)
        assert {f"step: {backbone} ifa batch 256", f"end to end: {backbone} cls batch 256"} < set(whats)
        assert f"IFA beside CLS: {backbone} batch 256" in whats
    assert {"step: vit_base_patch16 cls batch 256, 32 text tokens", "loader: on the GPU, batch 256"} < set(whats)
    assert all(point.kind in gpu_points.KINDS for point in points)
    assert [point.what for point in gpu.plan(gpu.SMOKE, "set") if point.smoke] == ROWS


def test_the_targets_are_computed_from_the_rows() -> None:
    step = {"arm": "synthetic", "backbone": "vit_large_patch16", "batch_size": 256}
    pairs = {"batch_size": 256, "time_over_cls": 1.004, "peak_over_cls_mb": 9.5}
    rows = [
        {"what": "a", "error": "broken"},
        step | {"mfu_of_matmul": 0.5},
        step | {"mfu_of_matmul": 0.6},
        step | {"out_of_memory": True},
        step | {"batch_size": 128, "mfu_of_matmul": 0.9},
        {"arm": "end_to_end", "data_wait_share": 0.002},
        {"arm": "end_to_end", "data_wait_share": 0.02},
        pairs,
        pairs | {"time_over_cls": 1.009, "peak_over_cls_mb": 60.0},
        pairs | {"batch_size": 64, "time_over_cls": 1.5},
    ]
    found = [(row["value"], row["limit"], row["met"]) for row in gpu.targets(rows, gpu.FULL)]
    assert found == [(0.6, 0.55, True), (0.02, 0.01, False), (0.009, 0.01, True), (0.06, 0.05, False)]


def test_what_only_a_gpu_is_asked_for_is_code_that_runs() -> None:
    in_bf16 = gpu.Point("a", "training", {"precision": "bf16", "zero_stage": 1, "steps": 3})
    row = gpu.measure_in_process(in_bf16, 300)
    assert row["met"] and row["loss_2"] < row["loss_0"]
    assert 0 < gpu_points.decoder(on_gpu=True)["hw_decoder_load"] <= 1
    with gpu_points.JpegEngine(watch=True) as jpeg:
        pass
    assert jpeg.highest is None or 0 <= jpeg.highest <= 100
