"""Weights & Biases, offline: one run there for one run folder, in which no point stands twice."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_train.models.saved import list_checkpoints
from tests.harness import train, wait_for, write_shard_set

pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")


def read_records(file: Path) -> Iterator[Any]:
    """The records of wandb's own file: 7 bytes, then LevelDB's log: blocks of 32 KB, records whole or in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + length > len(content):  # being written
            break
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole, or the last part
            yield Record.FromString(record)
            record = b""


def points(run: Path) -> tuple[set[str], Counter[tuple[str, int]]]:
    """(the ids of the runs there, how often each (name, step) was sent)."""
    ids, sent = set(), Counter()
    for file in run.glob("wandb/offline-run-*/run-*.wandb"):
        for record in read_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(items.get("_step", record.history.step.num))
                sent.update((name, step) for name in items if not name.startswith("_"))
    return ids, sent


def test_stops_kills_and_resumes_are_one_run_and_no_point_doubles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    shards = write_shard_set(tmp_path / "set", {"train": [30, 18], "val": [9], "test": [8]}, baked=20)
    run = tmp_path / "run"
    project = {"train__wandb_project": "tests", "train__keep_checkpoints": 9}
    for stop, resume in ((2, "none"), (6, "auto"), (3, "auto"), (7, "auto"), (0, "auto")):
        if stop == 3:  # as if it had been killed at 6, and its newest checkpoint were that of step 2
            for folder in list_checkpoints(run)[1:]:
                shutil.rmtree(folder)
        assert train(shards, run, resume, train__stop_after_steps=stop, **project) == 0
    last = {("train/loss", 8), ("val/top1", 8), ("test/top1", 8)}
    wait_for(lambda: last <= points(run)[1].keys(), "wandb's own process to write what it was sent")
    ids, sent = points(run)
    assert ids == {json.loads((run / "wandb.json").read_text())["id"]}
    assert set(sent.values()) == {1}
    assert sorted(step for name, step in sent if name == "train/loss") == list(range(1, 9))
    assert sorted(step for name, step in sent if name == "val/top1") == [4, 8]
    assert [step for name, step in sent if name == "test/top1"] == [8]
