"""train.patience and train.monitor: when a run ends early, what it keeps as its best, and that a resume knows both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_train.config import TrainConfig
from dist_train.models.saved import CHECKSUMS_NAME, STATE_NAME, choose_checkpoint, file_sha256, newest_checkpoint
from dist_train.train.checkpoint import RunState, read_state
from dist_train.train.evaluate import Evaluation
from dist_train.train.monitor import monitored, note_evaluation, out_of_patience
from tests.harness import (
    arguments,
    evaluations,
    logged_steps,
    newest_weights,
    read_summary,
    same,
    train,
    write_shard_set,
)
from tests.train.forked_ranks import train_on

# At this rate the model learns nothing: no evaluation is better than the first.
STANDS_STILL: dict[str, object] = {"optim__lr": 0, "train__epochs": 6, "train__patience": 2, "train__log_every": 3}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [24], "val": [9], "test": [8]}  # 2 steps an epoch
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, baked=20)


@pytest.fixture(scope="module")
def ended(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose patience was at its end after three epochs, 6 of 12 steps."""
    run = tmp_path_factory.mktemp("runs") / "ended"
    assert train(shards, run, **STANDS_STILL) == 0
    return run


def at_start(monitor: str) -> RunState:
    return RunState(0, 0, 0, 8, 1, 0, "float32", 2, "", monitor=monitor)


@pytest.mark.parametrize(
    ("metric", "values", "best_at", "since"),
    [
        ("top1", [0.5, 0.6, 0.6, 0.4], 1, 2),  # as good as the best is not better
        ("class_mean", [0.0, 0.0], 0, 1),
        ("loss", [2.0, float("nan"), 1.0, float("inf"), 1.5], 2, 2),
        ("loss", [float("nan"), 3.0], 1, 0),
    ],
)
def test_the_best_is_the_highest_or_the_lowest_loss_and_the_others_are_counted(
    metric: str, values: list[float], best_at: int, since: int
) -> None:
    state = at_start(metric)
    for step, value in enumerate(values):
        state.step = step
        note_evaluation(state, value, score=step / 10)
    assert (state.best_step, state.best_value, state.best_top1) == (best_at, values[best_at], best_at / 10)
    assert state.evaluations_since_best == since
    for patience in range(5):
        assert out_of_patience(state, TrainConfig(patience=patience)) == (0 < patience <= since)


def test_what_is_monitored_is_what_an_evaluation_says() -> None:
    counts = torch.tensor([1, 4, 0]), torch.tensor([2, 5, 0]), torch.tensor([2, 8, 0])
    result = Evaluation(*counts, loss=0.25, bad_samples=0)
    wanted = {"top1": 5 / 10, "top5": 7 / 10, "class_mean": (1 / 2 + 4 / 8) / 2, "loss": 0.25}
    assert {metric: monitored(result, metric) for metric in wanted} == wanted


def test_a_run_without_a_better_evaluation_ends_and_says_why(ended: Path) -> None:
    summary = read_summary(ended)
    assert (summary["steps"], summary["best_step"], summary["monitor"]) == (6, 2, "top1")
    assert summary["ended_by"].startswith("train.patience: 2 evaluations on val without a better top1 than ")
    assert [(e["split"], e["step"]) for e in evaluations(ended)] == [("val", 2), ("val", 4), ("val", 6), ("test", 6)]
    assert [step["step"] for step in logged_steps(ended)] == [3, 6]
    assert "ended after step 6 of 12 by train.patience" in (ended / "log.txt").read_text()
    assert choose_checkpoint(ended, "auto").step == 2


def test_the_last_steps_before_the_end_are_in_the_record(shards: Path, tmp_path: Path) -> None:
    changes = STANDS_STILL | {"train__log_every": 5, "train__patience": 1}
    assert train(shards, tmp_path / "run", **changes) == 0
    assert [step["step"] for step in logged_steps(tmp_path / "run")] == [4]


def test_an_ended_run_is_left_as_it_is_and_goes_on_with_more_patience(
    ended: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    assert train(shards, run, "auto", **STANDS_STILL) == 0
    assert f"{run} is complete, step 6 of 12: nothing to do" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before
    assert train(shards, run, "auto", **STANDS_STILL | {"train__patience": 3}) == 0
    assert read_summary(run)["steps"] == 8 and (run / "summary-step-00000006.json").is_file()
    assert train(shards, run, "auto", **STANDS_STILL | {"train__patience": 0}) == 0
    summary = read_summary(run)
    assert (summary["steps"], summary["ended_by"]) == (12, "train.epochs: 6 epochs are done")


def test_patience_counts_through_a_stop_and_the_schedule_does_not_know_of_it(
    ended: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, **STANDS_STILL, train__stop_after_steps=5) == 0
    assert train(shards, run, "auto", **STANDS_STILL) == 0
    ends = {"steps", "best_step", "best_value", "ended_by", "evaluations"}
    assert {key: read_summary(run)[key] for key in ends} == {key: read_summary(ended)[key] for key in ends}


def test_a_run_that_was_killed_between_its_end_and_its_summary_makes_no_more_steps(
    ended: Path, shards: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    (run / "summary.json").unlink()
    assert train(shards, run, "auto", **STANDS_STILL) == 0
    assert read_summary(run)["steps"] == 6 and [s["step"] for s in logged_steps(run)] == [3, 6]


def test_with_patience_that_lasts_the_weights_and_rates_are_those_without(shards: Path, tmp_path: Path) -> None:
    changes: dict[str, object] = {"optim__lr": 0.01, "train__epochs": 3, "optim__warmup_steps": 1}
    assert train(shards, tmp_path / "with", **changes, train__patience=3, train__monitor="loss") == 0
    assert train(shards, tmp_path / "without", **changes) == 0
    assert same(newest_weights(tmp_path / "with"), newest_weights(tmp_path / "without"))
    with_patience, without = (logged_steps(tmp_path / name) for name in ("with", "without"))
    assert [step["lr"] for step in with_patience] == [step["lr"] for step in without]
    losses = {e["step"]: e["loss"] for e in evaluations(tmp_path / "with") if e["split"] == "val"}
    assert read_summary(tmp_path / "with")["best_step"] == min(losses, key=lambda step: losses[step])


def test_a_checkpoint_from_before_there_was_a_monitor_is_resumed(ended: Path, shards: Path, tmp_path: Path) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    newest = newest_checkpoint(run)
    assert newest is not None
    document = json.loads((newest / STATE_NAME).read_text())
    for key in ("monitor", "best_value", "evaluations_since_best", "evaluation_due"):
        del document["state"][key]
    del document["sha256"]  # which stood in checksums.json
    (newest / STATE_NAME).write_text(json.dumps(document))
    described = json.loads((newest / CHECKSUMS_NAME).read_text())
    described[STATE_NAME] = {"bytes": (newest / STATE_NAME).stat().st_size, "sha256": file_sha256(newest / STATE_NAME)}
    (newest / CHECKSUMS_NAME).write_text(json.dumps(described))
    state = read_state(newest)
    assert state.best_value == state.best_top1 >= 0
    assert "top-1" in choose_checkpoint(run, "best").why
    assert train(shards, run, "auto", **STANDS_STILL) == 0
    assert read_summary(run)["steps"] == 10, "two evaluations more, which were no better than the best before"


def test_another_monitor_looks_for_the_best_anew(ended: Path, shards: Path, tmp_path: Path) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    assert train(shards, run, "auto", **STANDS_STILL, train__monitor="loss") == 0
    summary = read_summary(run)
    assert (summary["steps"], summary["best_step"], summary["monitor"]) == (12, 8, "loss")
    assert choose_checkpoint(run, "best").why.startswith("the best on val (loss ")


def test_several_ranks_end_together_where_one_would(ended: Path, shards: Path, tmp_path: Path) -> None:
    train_on(2, arguments(shards, tmp_path / "run", **STANDS_STILL), tmp_path)
    summary, alone = read_summary(tmp_path / "run"), read_summary(ended)
    assert (summary["world_size"], summary["steps"], summary["best_step"]) == (2, 6, 2)
    assert summary["evaluations"]["val"]["top1"] == alone["evaluations"]["val"]["top1"]


def test_patience_without_a_val_split_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [24]}, baked=20)
    assert train(shards, tmp_path / "run", train__patience=2) == 2
    assert "train.patience counts evaluations on val, and the shard set has no such split" in capsys.readouterr().err
