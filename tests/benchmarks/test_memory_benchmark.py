"""The benchmark `memory`: what it measures, and what the committed result says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import result
from benchmarks.__main__ import main
from benchmarks.speed import prediction

COMMITTED = Path(prediction.__file__).parents[1] / "results/memory/cpu.json"


def test_what_is_committed_meets_what_the_documents_say() -> None:
    document = json.loads(COMMITTED.read_bytes())
    here = [row for row in document["rows"] if row["on"] == "cpu"]
    gpus = [row for row in document["rows"] if row["on"] != "cpu"]
    assert [row["of_allocated"] for row in here] == pytest.approx([1] * len(prediction.SETTINGS), abs=0.01)
    assert len(gpus) > 20 and all(abs(row["of_allocated"] - 1) < 0.06 for row in gpus)
    assert sum(abs(row["of_allocated"] - 1) < 0.03 for row in gpus) > 0.8 * len(gpus)
    assert "within" in prediction.headline(document)


@pytest.mark.slow
@pytest.mark.launch
def test_a_recipe_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    small = "--model.backbone vit_tiny_patch16 --data.image_size 32 --train.batch_size 4"
    monkeypatch.setattr(prediction, "SETTINGS", (small,))
    assert main(["memory", "--name", "small", "--gpu", "false"]) == 0
    (row,) = json.loads((tmp_path / "memory/small.json").read_bytes())["rows"]
    assert row["of_allocated"] == pytest.approx(1, abs=0.01)
    assert row["resident_mb"] > 0.5 * row["predicted_mb"]
