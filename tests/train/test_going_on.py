"""A run that goes on: what is finished stays as it is, what has changed is said, and nothing is recorded twice."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_train.cli import main
from dist_train.config import Recipe
from dist_train.models.saved import list_checkpoints, newest_checkpoint, read_step
from dist_train.train import loop
from dist_train.train.checkpoint import read_state
from dist_train.train.ranks import StopSignal
from dist_train.train.record import RunRecord, start_console_log
from tests.harness import (
    error_line,
    evaluations,
    newest_weights,
    read_metrics,
    read_summary,
    same,
    steps_done,
    train,
    wait_for,
    write_shard_set,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [30, 18], "val": [9], "test": [8]}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, baked=20)


def stands_once(run: Path, steps: int) -> bool:
    entries = Counter((entry.get("split", "train"), entry["step"]) for entry in read_metrics(run))
    logged = [step for split, step in entries if split == "train"]
    return set(entries.values()) == {1} and sorted(logged) == list(range(1, steps + 1))


def contents(run: Path) -> dict[str, bytes]:
    """All files of a run but its lock, which names the process."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 8 steps, with checkpoints at 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(shards, run) == 0
    return run


@pytest.fixture(scope="module")
def stopped(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "stopped"
    assert train(shards, run, train__stop_after_steps=3) == 0
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


# ---------------------------------------------------------------------- nothing to do
def test_a_complete_run_that_is_resumed_is_left_as_it_is(copy: Path, shards: Path, capsys: Any) -> None:
    before = contents(copy)
    for overrides in ({}, {"train__epochs": 1}, {"train__stop_after_steps": 3}):
        assert train(shards, copy, "auto", **overrides) == 0
        assert f"{copy} is complete, step 8 of " in capsys.readouterr().err.splitlines()[-1]
        assert contents(copy) == before


def test_a_complete_run_goes_on_when_more_is_asked_for(copy: Path, shards: Path) -> None:
    first = read_summary(copy)
    assert train(shards, copy, "auto", train__epochs=3, train__stop_after_steps=9) == 0
    assert not (copy / "summary.json").exists(), "a summary is that of a complete run"
    assert json.loads((copy / "summary-step-00000008.json").read_text()) == first
    assert train(shards, copy, "auto", train__epochs=3) == 0
    assert read_summary(copy)["steps"] == 12
    assert stands_once(copy, 12)


def test_a_run_that_was_killed_before_its_result_gets_it_and_nothing_doubles(copy: Path, shards: Path) -> None:
    first = read_summary(copy)["evaluations"]
    (copy / "summary.json").unlink()
    assert train(shards, copy, "auto") == 0
    assert read_summary(copy)["evaluations"] == first
    assert stands_once(copy, 8)


class Killed(BaseException):
    """In the place of a SIGKILL."""


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_that_is_killed_while_it_evaluates_has_lost_no_step(
    finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run, evaluate = tmp_path / "run", loop.evaluate_split

    def evaluate_or_die(loader: Any, *others: Any) -> Any:
        if steps_done(run) == step:
            raise Killed
        return evaluate(loader, *others)

    monkeypatch.setattr(loop, "evaluate_split", evaluate_or_die)
    with pytest.raises(Killed):
        train(shards, run)
    wait_for(lambda: (newest := newest_checkpoint(run)) and read_step(newest) == step, "the checkpoint")
    saved = newest_checkpoint(run)
    assert saved is not None and read_state(saved).evaluation_due
    monkeypatch.undo()
    assert train(shards, run, "auto") == 0
    assert as_undisturbed(run, finished)


def test_a_run_that_is_stopped_at_the_end_of_an_epoch_evaluates_when_it_goes_on(
    finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may take longer than a queue waits between SIGTERM and SIGKILL."""
    run = tmp_path / "run"
    monkeypatch.setattr(StopSignal, "requested", lambda self, place: steps_done(run) == 3)  # asked after the fourth
    assert train(shards, run) == 0
    monkeypatch.undo()
    assert steps_done(run) == 4 and evaluations(run) == []
    assert train(shards, run, "auto") == 0
    assert as_undisturbed(run, finished)


def as_undisturbed(run: Path, finished: Path) -> bool:
    """Weights, what is best of them and the evaluations are the same, and each step stands in the record once."""
    newest, expected = newest_checkpoint(run), newest_checkpoint(finished)
    assert newest is not None and expected is not None
    return (
        stands_once(run, 8)
        and evaluations(run) == evaluations(finished)
        and read_state(newest) == read_state(expected)
        and same(newest_weights(run), newest_weights(finished))
        and read_summary(run)["evaluations"] == read_summary(finished)["evaluations"]
    )


def test_a_run_beyond_the_step_where_it_shall_stop_stops_at_once(shards: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__stop_after_steps=3) == 0
    before = contents(run)
    for stop in (3, 2):
        assert train(shards, run, "auto", train__stop_after_steps=stop) == 0
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"{run} is at step 3 already, and train.stop_after_steps is {stop}: nothing to do")
        assert contents(run) == before
    assert train(shards, run, "auto", train__epochs=1, train__batch_size=12, train__stop_after_steps=0) == 0
    assert train(shards, run, "auto", train__epochs=1) == 0
    assert stands_once(run, 4)


def test_a_run_beyond_the_end_that_is_asked_for_is_refused(shards: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__stop_after_steps=6) == 0
    assert train(shards, run, "auto", train__epochs=1) == 2
    assert "is at step 6 already, and train.epochs 1 ends at step 4; set a higher" in capsys.readouterr().err


def test_a_run_that_goes_on_from_before_its_end_and_is_killed_does_not_return_to_that_end(
    copy: Path, finished: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(loop._Run, "log_steps", die)
    with pytest.raises(Killed):
        train(shards, copy, "4", optim__lr=0.1)
    assert (copy / "checkpoints" / "latest").read_text() == "step-00000004\n"
    monkeypatch.undo()
    assert train(shards, copy, "auto", optim__lr=0.1) == 0
    assert stands_once(copy, 8) and not same(newest_weights(copy), newest_weights(finished))


# ---------------------------------------------------------------------- another recipe
def test_what_a_resumed_run_does_otherwise_is_one_line_and_the_recipe_before_is_kept(
    shards: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__stop_after_steps=2) == 0
    before = yaml.safe_load((run / "recipe.yaml").read_text())
    capsys.readouterr()
    # Nothing of this changes what is computed.
    assert train(shards, run, "auto", train__stop_after_steps=3, train__log_every=2, data__prefetch=1) == 0
    assert "the recipe is another one" not in capsys.readouterr().err and not list(run.glob("recipe-*"))
    changed = {"optim__lr": 0.5, "train__epochs": 3, "data__flip": "false"}
    assert train(shards, run, "auto", train__stop_after_steps=5, **changed) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "recipe is another one" in line]
    assert line.startswith("from step 4 on the recipe is another one: ")
    for change in ("optim.lr 0.001 -> 0.5", "train.epochs 2 -> 3", "data.flip True -> False"):
        assert change in line
    assert line.count("->") == 3 and line in (run / "log.txt").read_text()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["optim"]["lr"] == 0.5
    (kept,) = run.glob("recipe-*")
    former = yaml.safe_load(kept.read_text())
    assert kept.name == "recipe-until-step-00000003.yaml"
    assert former["optim"] == before["optim"] and former["data"]["flip"] is True
    assert train(shards, run, "auto", **changed) == 0
    assert "recipe is another one" not in capsys.readouterr().err and list(run.glob("recipe-*")) == [kept]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train__seed": 3}, "train.seed was 0, now it is 3"),
        ({"train__batch_size": 24}, "train.batch_size was 12, now it is 24"),
        ({"optim__name": "adamw"}, "optim.name was sgd, now it is adamw"),
        ({"data__streams": 2}, "data.streams was 0, now it is 2"),
        ({"data__shuffle_window": 16}, "data.shuffle_window was 4096, now it is 16"),
        ({"model__head": "ifa"}, "model.head was cls, now it is ifa"),
    ],
)
def test_what_cannot_change_is_refused_whether_the_run_is_complete_or_not(
    finished: Path, shards: Path, capsys: Any, change: dict[str, object], said: str
) -> None:
    before = contents(finished)
    for epochs in (2, 4):
        assert train(shards, finished, "auto", train__epochs=epochs, **change) == 2
        assert said in error_line(capsys.readouterr().err)
    assert contents(finished) == before


def test_the_weights_that_a_run_started_from_need_not_be_there_when_it_goes_on(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start.safetensors"
    assert main(["export", str(finished), str(start)]) == 0
    assert train(shards, tmp_path / "run", train__stop_after_steps=2, model__weights=start) == 0
    start.unlink()
    assert train(shards, tmp_path / "run", "auto", train__stop_after_steps=3, model__weights=start) == 0
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000003"]


# ---------------------------------------------------------------------- a record that was cut
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],  # within the last line
        lambda text: text + b'{"step": 4, "epo',
        lambda text: text + b"\0" * 100,  # what some file systems leave after a power cut
        lambda text: text[:-1],  # the line is whole but for its end
        lambda text: text + b'{"st\xff\xfe\n',
        lambda text: text + b"7\n[]\nnull\n",
    ],
    ids=["cut", "begun", "zeros", "no-newline", "not-utf8", "not-an-entry"],
)
def test_a_cut_line_of_the_metrics_is_left_out_and_the_run_goes_on(
    stopped: Path, shards: Path, tmp_path: Path, capsys: Any, damage: Any
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert train(shards, run, "auto", train__stop_after_steps=4) == 0
    assert "Traceback" not in capsys.readouterr().err
    steps = [entry["step"] for entry in read_metrics(run) if "split" not in entry]
    assert steps == [1, 2, 3, 4] or (steps == [1, 2, 4] and damage(whole) == whole[:-20])


@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 300 MB."""
    return mount_disk("300m")


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)


def test_on_a_full_disk_the_record_fails_by_one_error_and_prints_nothing(
    small_disk: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    escaped: list[threading.ExceptHookArgs] = []  # Python prints a traceback for each
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    start_console_log(0)
    record = RunRecord(small_disk / "run", Recipe(), 0, 0)
    fill(small_disk)
    for number in range(100):  # more than the log's last block has room for
        logging.getLogger("dist_train").info("line %d of the log, which must not end the run, nor print more", number)
    names = ("samples", "epoch", "loss", "lr", "images_per_s", "step_ms", "data_wait_ms", "mfu", "memory_mb")
    with pytest.raises(OSError, match="No space left"):
        for step in range(1, 200):
            record.step({"step": step, **dict.fromkeys(names, 0.5)}, 200, 1)
    with suppress(OSError):
        record.close()
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Logging error" not in said and not escaped
    assert len(logging.getLogger("dist_train").handlers) == 1, "the log file is closed all the same"


def test_a_disk_that_is_full_in_mid_run_is_one_line_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, shards: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    escaped: list[threading.ExceptHookArgs] = []  # Python prints a traceback for each
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    run = small_disk / "run"

    def fill_the_disk() -> None:
        wait_for(lambda: steps_done(run) >= 6, "step 6")  # there is a checkpoint of step 4
        fill(small_disk)

    thread = threading.Thread(target=fill_the_disk)
    thread.start()
    assert train(shards, run, train__epochs=500) == 1
    thread.join()
    said = capsys.readouterr().err
    line = error_line(said)
    assert str(run) in line and "--resume auto" in line
    assert "Traceback" not in said and "Logging error" not in said and not escaped, said
    (small_disk / "filler").unlink()
    step = read_step(newest_checkpoint(run)) + 1
    assert train(shards, run, "auto", train__epochs=500, train__stop_after_steps=step) == 0
    assert stands_once(run, step)
