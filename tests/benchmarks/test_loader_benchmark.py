"""The benchmarks run, write what the README says, and the committed report is made from the committed results."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report, result
from benchmarks.__main__ import main
from benchmarks.speed import loader, scale
from benchmarks.speed.loader import CONTESTANTS, LIMITS, check_limits
from benchmarks.speed.peers import dali_native, ffcv_loader, timm_loader
from benchmarks.speed.peers.serve import note_of
from benchmarks.speed.scale_point import most_at_once
from dist_train.errors import WorkError
from tests.harness import REPOSITORY


def test_the_loader_benchmark_measures_each_contestant(
    shard_set: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    shards = shard_set({"train": [40, 30]}, baked=40)
    names = "ours,dali_native,torchvision_v2,dali_decode,bytes_only"
    arguments = f"--name small --size 32 --margin 8 --batch 8 --threads 1 --rounds 2 --seconds 0.1 --only {names}"
    assert main(["loader", "--images", str(shards), "--scratch", str(tmp_path / "scratch"), *arguments.split()]) == 0
    document = json.loads((tmp_path / "results/loader/small.json").read_bytes())
    assert {
        "bench",
        "command",
        "commit",
        "date",
        "hardware",
        "busy_elsewhere",
        "versions",
        "parameters",
        "rows",
    } == set(document)
    assert [row["loader"] for row in document["rows"]] == [CONTESTANTS[name] for name in names.split(",")]
    for row in document["rows"]:
        assert row["images_per_s_lowest"] <= row["images_per_s"] <= row["images_per_s_highest"]
        assert row["cpu_s_per_1000"] > 0 and row["peak_mb"] > 10 and row["first_batch_s"] > 0
        assert row["training_thread_us_per_sample"] >= 0
        assert ("host_us_per_sample" in row) == (row["loader"] == "this project")
    assert document["rows"][0]["ours_is_times"] == 1
    assert document["rows"][0]["host_us_per_sample"] > 0


def test_the_loader_benchmark_fails_by_name_where_host_work_or_the_first_batch_is_above_its_limit(
    shard_set: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    shards = shard_set({"train": [40, 30]}, baked=40)
    arguments = "--name a --size 32 --margin 8 --batch 1 --threads 1 --rounds 1 --seconds 0.1 --only ours --check"
    # In batches of 1 a sample costs what a batch costs, hundreds of microseconds on any machine.
    assert main(["loader", "--images", str(shards), "--scratch", str(tmp_path), *arguments.split()]) == 1
    assert "this project: host_us_per_sample" in capsys.readouterr().err
    assert (tmp_path / "results/loader/a.json").exists()
    within = {"loader": "this project", **LIMITS}
    check_limits(within)
    for name, limit in LIMITS.items():
        with pytest.raises(WorkError, match=f"{name} .* is above {limit}"):
            check_limits(within | {name: limit * 1.01})


def test_a_loader_that_fails_after_its_rounds_costs_the_others_nothing(
    shard_set: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    measure = loader._peak_memory

    def fail(contestant: loader.Contestant, seconds: float) -> float:
        if contestant.name == "ours":
            raise WorkError("no memory left")
        return measure(contestant, seconds)

    monkeypatch.setattr(loader, "_peak_memory", fail)
    arguments = f"--images {shard_set({'train': [40]}, baked=40)} --scratch {tmp_path} --name f --size 32 --margin 8"
    arguments += " --batch 8 --threads 1 --rounds 1 --seconds 0.1 --only ours,bytes_only --check"
    assert main(["loader", *arguments.split()]) == 1
    assert "error: this project was not measured: ours: no memory left" in capsys.readouterr().err
    ours, other = json.loads((tmp_path / "results/loader/f.json").read_bytes())["rows"]
    assert ours["absent"] == "ours: no memory left" and other["images_per_s"] > 0 and other["peak_mb"] > 0


def test_memory_is_counted_in_millions_of_bytes() -> None:
    before = loader._resident_mb(os.getpid())
    held = np.ones(200_000_000, np.uint8)
    assert loader._resident_mb(os.getpid()) - before == pytest.approx(held.nbytes / 1e6, rel=0.02)


def test_what_differs_is_said_of_the_augmentation_that_is_measured() -> None:
    for peer, words in ((dali_native, "jitter"), (ffcv_loader, "jitter"), (timm_loader, "0.8 x 0.8")):
        assert words in note_of(peer, usual=False) and words not in note_of(peer, usual=True)
    assert "on the main process" in note_of(timm_loader, usual=True)


def test_a_set_of_one_shard_is_measured_and_one_without_a_batch_refused(
    shard_set: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    shards = shard_set({"train": [40]}, baked=40)
    arguments = f"--images {shards} --scratch {tmp_path} --name one --size 32 --margin 8 --threads 2 --rounds 1"
    arguments += " --seconds 0.1 --only bytes_only,webdataset_library"
    assert main(["loader", *arguments.split(), "--batch", "8"]) == 0
    path = tmp_path / "results/loader/one.json"
    assert all(row["images_per_s"] > 0 for row in json.loads(path.read_bytes())["rows"])
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert main(["loader", *arguments.split(), "--batch", "64"]) == 2
    assert "--batch 64 is more than the 40 training images" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is not None, reason="FFCV is installed")
def test_a_loader_that_is_not_installed_is_reported_not_an_error(
    shard_set: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    shards = shard_set({"train": [40]}, baked=40)
    assert (
        main(
            [
                "loader",
                "--images",
                str(shards),
                "--scratch",
                str(tmp_path),
                "--name",
                "a",
                "--batch",
                "8",
                "--only",
                "ffcv_loader",
            ]
        )
        == 0
    )
    assert (
        "No module named 'ffcv'" in json.loads((tmp_path / "results/loader/a.json").read_bytes())["rows"][0]["absent"]
    )


def test_the_scale_benchmark_finds_that_a_node_reads_its_share_and_says_what_the_report_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    arguments = "--samples 1000000 --shards 10000 --nodes 16 --ranks 2 --batch 1024 --name small"
    assert main(["scale", *arguments.split()]) == 0
    sentence, path = capsys.readouterr().out.splitlines()[-2:]
    assert sentence == scale.headline(json.loads(Path(path).read_bytes())) and "1,000,000 samples: first" in sentence
    rows = json.loads((tmp_path / "scale/small.json").read_bytes())["rows"]
    assert [row["what"] for row in rows[:2]] == ["start at step 0", "start at step 1,000,000"]
    assert all(row["read_over_share"] < 1.05 for row in rows[2:])


def test_most_at_once_counts_overlapping_uses() -> None:
    assert most_at_once([0, 1, 5], [3, 5, 9]) == 2
    assert most_at_once([0, 0, 0], [0, 0, 0]) == 3
    assert most_at_once([0, 1, 2], [0, 1, 2]) == 1


def test_the_committed_report_is_made_from_the_committed_results() -> None:
    assert (REPOSITORY / "benchmarks/RESULTS.md").read_text() == report.render_report()
