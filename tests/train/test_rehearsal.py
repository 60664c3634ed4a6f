"""`train --dry-run` and `dist-train lr`: real steps that leave nothing of a run behind."""

from __future__ import annotations

import csv
import itertools
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_train.cli import main
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError
from dist_train.parse import parse_recipe, parse_training
from dist_train.train.dry_run import Estimate, count_evaluations
from dist_train.train.lr_range import RangeTest, ramp, running_means
from tests.harness import arguments, environment, logged_steps, train, wait_for, write_shard_set
from tests.train.forked_ranks import train_on


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [48], "val": [9], "test": [8]}  # 4 steps an epoch
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, baked=20)


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# ---------------------------------------------------------------------- dry run
def test_a_dry_run_says_what_a_run_will_take_and_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "logs").mkdir()
    options = arguments(shards, tmp_path / "runs" / "mine", **{"train.epochs": 5, "deepspeed.zero_stage": 1})
    train_on(2, [*options, "--dry-run", "--price-per-hour=36000"], tmp_path / "logs")
    lines = (tmp_path / "logs" / "rank0.log").read_text().splitlines()
    said = dict(line.split(maxsplit=1) for line in lines[-5:])
    assert list(said) == ["measured", "memory", "speed", "time", "cost"]
    assert said["measured"].endswith("steps of 12 samples") and re.search(
        r"for each of 2 ranks; [1-9][0-9]* MB predicted for the step alone$", said["memory"]
    )
    assert ": 20 steps in " in said["time"]
    speed, step_ms = (float(word.replace(",", "")) for word in (said["speed"].split()[0], said["speed"].split()[2]))
    assert speed * step_ms / 1000 == pytest.approx(12, rel=0.02)
    assert said["cost"].endswith(" at 36000 an hour") and float(said["cost"].split()[0].replace(",", "")) > 0
    assert any("ZeRO 1; 4 classes, 48 train, 9 val, 8 test samples" in line for line in lines)
    assert not any((tmp_path / "runs").iterdir())


def test_time_and_cost_are_those_of_all_steps_and_evaluations() -> None:
    estimate = Estimate(2, 10, 64, 1234.4, 80e3, 100.0, 640.0, 3.0, 400.0, 9000, 72_000, price_per_hour=2.0)
    assert (estimate.training_s, estimate.evaluation_s) == (5760, 180)
    said = str(estimate)
    assert "1:39:00: 9,000 steps in 1:36:00, evaluations in 0:03:00" in said and "3.30 at 2 an hour" in said
    once = replace(estimate, cached=True, eval_images=40_000)
    assert "100 s: 40,000 images once through the frozen backbone; the head's 9,000 steps" in str(once)
    assert "1,234 MB of the GPU's 80,000 MB, at most, for each of 2 ranks" in said


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({}, {"val": 3, "test": 1}),
        ({"train__ema": 0.9}, {"val": 6, "test": 2}),
        ({"train__stop_after_steps": 17}, {"val": 2}),  # of 20 steps, 4 an epoch
        ({"train__stop_after_steps": 7}, {}),
        ({"train__stop_after_steps": 20}, {"val": 3, "test": 1}),
    ],
)
def test_a_dry_run_counts_the_evaluations_until_the_run_ends_or_is_to_stop(
    shards: Path, tmp_path: Path, changes: dict[str, object], times: dict[str, int]
) -> None:
    words = arguments(shards, tmp_path, **{"train__epochs": 5, "train__eval_every": 2}, **changes)
    assert count_evaluations(parse_recipe(words)[0], read_manifest(shards), 20) == times


@pytest.mark.parametrize(("batch_size", "every"), [(96, 1), (96, 2), (96, 3), (72, 2), (192, 5)])
def test_a_batch_larger_than_the_split_is_evaluated_after_once(
    shards: Path, tmp_path: Path, batch_size: int, every: int
) -> None:
    recipe, _ = parse_recipe(arguments(shards, tmp_path, train__batch_size=batch_size, train__eval_every=every))
    recipe.train.epochs = 10
    steps = -(-480 // batch_size)
    epochs = [step * batch_size // 48 // every for step in range(steps + 1)]
    due = [after > before or step == steps - 1 for step, (before, after) in enumerate(itertools.pairwise(epochs))]
    assert count_evaluations(recipe, read_manifest(shards), steps) == {"val": sum(due), "test": 1}


@pytest.mark.launch
def test_a_dry_run_that_is_told_to_end_leaves_nothing_either(shards: Path, tmp_path: Path) -> None:
    words = [*arguments(shards, tmp_path / "run", model__backbone="vit_base_patch4"), "--dry-run"]
    command = [sys.executable, "-m", "dist_train.cli", "train", *words]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: list(tmp_path.glob(".rehearsal-*")), "the temporary run folder")
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
    assert contents(tmp_path) == set()


def test_a_dry_run_is_refused_what_a_run_would_be(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["train", *arguments(shards, tmp_path / "run", train__batch_size=10, data__streams=4), "--dry-run"]) == 2
    )
    assert "data.streams 4 does not divide" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    assert main(["train", *arguments(shards, tmp_path / "old"), "--dry-run"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", *arguments(shards, tmp_path / "old"), "--dry-run", "--resume", "auto"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("--resume   takes nothing off")
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["metrics.jsonl"]


def test_its_options_are_read_beside_the_recipes() -> None:
    asked = parse_training(["--dry-run", "--optim.lr", "0.5", "--price-per-hour", "2"])
    assert (asked.dry_run, asked.price_per_hour, asked.recipe.optim.lr) == (True, 2.0, 0.5)
    assert not parse_training(["--optim.lr", "0.5"]).dry_run
    for words in (["--price-per-hour", "2"], ["--dry-run", "--price-per-hour=-1"], ["--dry-run", "--price-per-hour=x"]):
        with pytest.raises(UseError, match="price"):
            parse_training(words)
    with pytest.raises(UseError, match="--dry-run belongs to the training"):
        parse_recipe(["--dry-run"])


# ---------------------------------------------------------------------- range test
def test_the_range_test_writes_what_it_saw_and_blocks_no_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "mine"
    changes: dict[str, object] = {"train__epochs": 1, "optim__lr_scaling": "linear", "optim__lr_reference_batch": 6}
    changes["model__head_init"] = "default"  # with a head of zeros the first loss would be that of any model
    options = arguments(shards, run, **changes)
    assert main(["lr", *options, "--low", "0.0001", "--high", "1000", "--steps", "40"]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = list(csv.DictReader(open(tmp_path / "runs" / "mine-lr.csv")))
    rates, losses = ([float(row[name]) for row in rows] for name in ("lr", "loss"))
    assert 10 < len(rows) < 40, "it ends where the loss diverges"
    assert np.allclose(np.diff(np.log(rates)), math.log(1e7) / 39, atol=1e-4) and rates[0] == 0.0001
    suggestion = float(said[0].split()[1].rstrip(":"))
    smoothed = [float(row["smoothed_loss"]) for row in rows]
    assert suggestion == pytest.approx(rates[int(np.argmin(smoothed))] / 10, rel=0.06)  # as it is printed
    files = {run.with_name("mine-lr.csv"), run.with_name("mine-lr.png")}
    assert contents(tmp_path) == {tmp_path / "runs", *files} and said[-2:] == [str(file) for file in sorted(files)]
    assert run.with_name("mine-lr.png").read_bytes().startswith(b"\x89PNG")
    assert main(["lr", *options, "--output", str(run.with_name("mine-lr.csv") / "table.csv")]) == 1
    said_before_steps = capsys.readouterr().err
    assert "choose another --output" in said_before_steps and "step 1 " not in said_before_steps
    assert main(["lr", *options, "--resume", "auto"]) == 2
    assert "a range test begins with the recipe's weights" in capsys.readouterr().err

    # Its first step is the run's at that rate: the same model, batch and loss; optim.lr is what a recipe would say.
    assert train(shards, run, **changes, optim__lr=rates[0]) == 0
    steps = logged_steps(run)
    assert steps[0]["loss"] == pytest.approx(losses[0], rel=1e-5) and steps[0]["lr"] == 2 * rates[0]


def test_the_running_mean_and_the_suggestion_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    losses = list(
        2 - np.minimum(np.arange(50), 30) / 30 + np.maximum(np.arange(50) - 30, 0) / 3 + rng.normal(0, 0.01, 50)
    )
    weights = [0.9 ** np.arange(n, -1, -1) for n in range(50)]
    wanted = [float((w * losses[: n + 1]).sum() / w.sum()) for n, w in enumerate(weights)]
    assert running_means(losses) == pytest.approx(wanted)
    rates = ramp(1e-5, 1.0, 50)
    result = RangeTest(rates, losses, running_means(losses), diverged=True)
    assert result.suggestion == rates[int(np.argmin(wanted))] / 10 and not result.doubts()
    assert rates[0] == 1e-5 and rates[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("losses", "diverged", "doubt"),
    [(np.linspace(1, 2, 40), True, "never fell"), (np.linspace(2, 1, 40), False, "still fell at the highest rate")],
)
def test_a_test_that_shows_nothing_says_so(losses: np.ndarray, diverged: bool, doubt: str) -> None:
    result = RangeTest(ramp(1e-5, 1.0, 40), list(losses), running_means(list(losses)), diverged)
    assert doubt in result.doubts()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--low 1 --high 0.1", "--low must be below --high"),
        ("--steps 5", "--steps 10 or more"),
        ("--output table.txt", "name the file .csv"),
        ("--optim.lrr 1", "did you mean optim.lr?"),
    ],
)
def test_wrong_use_of_the_range_test_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    assert main(["lr", *arguments(shards, tmp_path / "run"), *words.split()]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
