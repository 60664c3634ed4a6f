"""The kill study in short: the full one is `python -m benchmarks kill`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.claims.kill import Arguments, study_kills
from dist_train.errors import UseError
from tests.harness import write_shard_set


def test_a_run_killed_in_a_step_an_evaluation_and_a_checkpoint_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [37, 50, 9], "val": [13]}, baked=20)
    row = study_kills(Arguments(shards, "x", kills=3, epochs=8, scratch=tmp_path))
    assert row["kills"] == 3 and row["steps"] == 32
    assert row["identical_weights"] and row["each_sample_once"]


def test_what_cannot_be_killed_is_said_before_the_first_run(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24]}, baked=20)
    for asked, said in (
        (Arguments(shards, "x", ranks=5, scratch=tmp_path), "--ranks: 5 does not divide the batch of 24"),
        (Arguments(shards, "x", scratch=tmp_path), "no split 'val', only train"),
    ):
        with pytest.raises(UseError, match=said):
            study_kills(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
