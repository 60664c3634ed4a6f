"""The benchmark `memory`: what it measures, and how near predictions come to the committed points of GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import result
from benchmarks.__main__ import main
from benchmarks.speed import prediction


@pytest.mark.slow
def test_what_gpus_took_is_predicted_to_three_hundredths() -> None:
    rows = list(prediction.of_gpus())
    assert len(rows) > 20 and {row["on"] for row in rows} >= {"nvidia-h100", "nvidia-h200"}
    assert [row["of_allocated"] for row in rows] == pytest.approx([1] * len(rows), abs=0.03)


def test_what_is_said_of_memory_on_a_cpu_is_what_was_measured() -> None:
    rows = result.read_rows("memory", "cpu")
    assert len(rows) == 9  # "all nine recipes measured"
    assert [row["of_allocated"] for row in rows] == pytest.approx([1] * 9, abs=0.0149)  # "about 1 %"
    more = [row["resident_mb_given_back"] - row["predicted_mb"] for row in rows]
    assert 15 <= min(more) and max(more) < 35.5  # "15 to 35 MB more than predicted"
    share = [1 - row["of_resident_given_back"] for row in rows]
    assert (round(100 * min(share)), round(100 * max(share))) == (2, 12)  # "2 to 12 % of the whole"
    assert max(row["resident_mb"] - row["predicted_mb"] for row in rows) > 100  # "may be hundreds of MB more"


@pytest.mark.slow
@pytest.mark.launch
def test_a_recipe_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    # Not smaller: what a kernel of the first convolution's gradient takes, 5 MB, must not be what there is most of.
    small = "--model.backbone vit_tiny_patch16 --data.image_size 128 --train.batch_size 16"
    monkeypatch.setattr(prediction, "SETTINGS", (small,))
    assert main(["memory", "--name", "small", "--here-alone"]) == 0
    (row,) = json.loads((tmp_path / "memory/small.json").read_bytes())["rows"]
    assert row["of_allocated"] == pytest.approx(1, abs=0.01)
    assert row["resident_mb"] > 0.5 * row["predicted_mb"]
    assert row["resident_mb_given_back"] > row["predicted_mb"]
