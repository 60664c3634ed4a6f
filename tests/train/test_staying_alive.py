"""A job whose ranks are lost ends and says which; a folder and a bad step are guarded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from dist_train.cli import main, parse_recipe, run_training
from dist_train.data.loader import Batch
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import EpochPlan
from dist_train.errors import UseError
from dist_train.models.build import build_model
from dist_train.models.saved import newest_checkpoint
from dist_train.place import Place
from dist_train.train import engine
from dist_train.train.badsteps import BadSteps
from dist_train.train.checkpoint import read_state
from dist_train.train.engine import build_engine, init_process_group
from dist_train.train.losses import Objective
from dist_train.train.meters import StepMeter
from dist_train.train.ranks import StopSignal
from dist_train.train.step import TrainStep, make_forward
from tests import harness
from tests.harness import (
    environment,
    launcher,
    ranks_under,
    read_summary,
    steps_done,
    wait_for,
    write_shard_set,
)
from tests.train.forked_ranks import fork_ranks, run_on
from tests.train.watched_rank import meet

pytestmark = pytest.mark.usefixtures("nothing_stays")
TIMEOUT_S = 6
arguments = partial(harness.arguments, optim__lr=0.01, train__epochs=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [30, 18]}, baked=20)


# ---------------------------------------------------------------------- lost ranks
@pytest.mark.launch
@pytest.mark.parametrize(
    ("fate", "said"),
    [
        ("killed", "rank 1 on {host} has died"),
        ("stopped", "no sign of life for 6 s (train.timeout_s) from rank 1 on {host}"),
        ("hangs", "rank 1 on {host} took no part in what all ranks do together"),
        ("fails", "error (rank 1 on {host}): a file of mine is damaged"),
    ],
)
def test_a_lost_rank_ends_the_others_in_time_and_is_named(tmp_path: Path, fate: str, said: str) -> None:
    ranks = fork_ranks(2, tmp_path, meet, fate, TIMEOUT_S)
    try:
        ranks[0].join(120)
        with suppress(ProcessLookupError):  # it was killed
            os.kill(ranks[1].pid, signal.SIGCONT)
        ranks[1].join(TIMEOUT_S + 30)  # one that hangs is ended, too
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].exitcode == 1 and ranks[1].exitcode in (1, -signal.SIGKILL)
    heard = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(2))
    lines = [line for line in heard.splitlines() if "error (" in line]
    assert said.format(host=socket.gethostname()) in "\n".join(lines), heard
    assert "Traceback" not in heard


@pytest.mark.launch
def test_ranks_whose_launcher_is_killed_save_and_end(shards: Path, tmp_path: Path) -> None:
    options = arguments(shards, tmp_path / "run", train__epochs=1000)
    job = subprocess.Popen(launcher(2, options), env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, "step 2")
    ranks = ranks_under(job.pid)
    assert len(ranks) == 2
    for process in [*psutil.Process(job.pid).children(), job]:
        process.kill()
    job.wait()
    _, alive = psutil.wait_procs(ranks, 60)
    assert not alive
    assert read_state(newest_checkpoint(tmp_path / "run")).step == steps_done(tmp_path / "run")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("ranks", "begun"),
    [(2, True), pytest.param(1, False, marks=pytest.mark.slow)],
    ids=["training", "importing"],
)
def test_sigterm_to_the_deepspeed_command_makes_the_ranks_save_and_end(
    shards: Path, tmp_path: Path, ranks: int, begun: bool
) -> None:
    """The command ends at once and passes nothing on; what it started between itself and the ranks lives. Ranks that
    still import must not take who adopted that for their launcher.
    """
    run, said = tmp_path / "run", tmp_path / "said"
    command = launcher(ranks, arguments(shards, run, train__epochs=1000))
    with open(said, "w") as stderr:
        job = subprocess.Popen(command, env=environment(), stderr=stderr, stdout=subprocess.DEVNULL)
    wait_for(lambda: (steps_done(run) >= 2) if begun else any(map(imports, ranks_under(job.pid))), "the ranks")
    processes = psutil.Process(job.pid).children(recursive=True)
    assert len(ranks_under(job.pid)) == ranks and len(processes) == 1 + ranks
    job.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, 120)
    job.wait()
    for process in alive:
        process.kill()
    assert not alive
    assert read_state(newest_checkpoint(run)).step == steps_done(run)
    assert "its launcher is gone; stopping" in said.read_text()
    assert "--resume auto continues" in said.read_text()


def imports(process: psutil.Process) -> bool:
    """Whether it has begun to read what takes seconds to import."""
    with suppress(psutil.Error):  # of the launcher's own short-lived children
        return any("/torch/" in mapped.path for mapped in process.memory_maps())
    return False


@pytest.mark.launch
def test_ctrl_c_saves_and_says_how_to_go_on(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, train__epochs=1000)
    command = [sys.executable, "-m", "dist_train.cli", "train", *options]

    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: steps_done(run) >= 2, "step 2")
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, "so that the next command of a script does not begin"
    assert "interrupted: saving a checkpoint after this step; Ctrl-C again ends without one" in said
    assert "--resume auto continues" in said and "Traceback" not in said
    assert read_state(newest_checkpoint(run)).step == steps_done(run)


def test_a_second_ctrl_c_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal(60) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(Place()) and stop.interrupted
        assert capfd.readouterr().err.count("interrupted") == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_terminal_that_is_closed_saves_too_unless_nohup_forbids(shards: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        with StopSignal(60) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested(Place())
        assert signal.getsignal(signal.SIGHUP) == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignal(60) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested(Place())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_while_the_ranks_agree_is_heard_after_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most of the time that a rank waits for the others it waits there."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    try:
        with StopSignal(60) as stop:
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
            assert not stop.requested(Place(0, 2, 2))
            monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
            assert stop.requested(Place(0, 2, 2))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------- SLURM
def train_as_slurm_does(options: list[str]) -> None:
    """Train as a rank that knows its place from SLURM alone."""
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "4711"}
    os.environ.update(job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
    run_training(options)


@pytest.mark.launch
def test_ranks_find_their_places_in_slurms_variables(shards: Path, tmp_path: Path) -> None:
    run_on(2, tmp_path, train_as_slurm_does, arguments(shards, tmp_path / "run"))
    assert read_summary(tmp_path / "run")["world_size"] == 2


def test_hosts_may_have_unlike_numbers_of_tasks() -> None:
    assert [engine._tasks_of_node("8(x2),4", node) for node in range(3)] == ["8", "8", "4"]
    assert engine._tasks_of_node("2", 0) == "2"


def test_a_command_in_a_shell_of_a_job_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is put there goes again
        monkeypatch.delenv(name)
    for name, value in {"NUM_TASKS": "1", "TASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    engine._describe_ranks()
    assert [os.environ[name] for name in names[:5]] == ["0", "0", "1", "1", "127.0.0.1"]


def test_a_rank_without_the_rest_of_its_place_is_told_what_to_do(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # which another test may have left
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert harness.train(shards, tmp_path / "run") == 2
    assert "but not LOCAL_RANK, WORLD_SIZE, MASTER_PORT; unset RANK" in harness.error_line(capsys.readouterr().err)


def test_more_ranks_than_gpus_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UseError, match="rank 1 is number 2 of its host, but sees 1 GPU; start a rank for each GPU"):
        init_process_group()


# ---------------------------------------------------------------------- the run folder's disk
@pytest.fixture
def small_disk(mount_disk: Callable[[str], Path]) -> Path:
    """A file system of 4 MB."""
    return mount_disk("4m")


def test_a_full_disk_ends_the_run_with_one_line_and_no_half_checkpoint(
    small_disk: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments(shards, small_disk / "run")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {small_disk}") and "no room for step-" in said
    assert newest_checkpoint(small_disk / "run") is None


def test_a_read_only_disk_is_named(small_disk: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert main(["train", *arguments(shards, small_disk / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (f"error: train.run {small_disk / 'run'}: {small_disk} cannot be written; choose another train.run")


# ---------------------------------------------------------------------- bad steps
@pytest.mark.parametrize("log_every", [4, 100])  # at the end of the epoch, where a checkpoint is due, or much later
def test_a_loss_that_is_not_finite_ends_the_run_and_the_samples_of_its_step_are_written(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log_every: int
) -> None:
    run = tmp_path / "run"
    changes = {"optim.lr": "1e30", "optim.schedule": "constant", "train.log_every": log_every, "train.epochs": 2}
    assert main(["train", *arguments(shards, run, **changes)]) == 1
    assert newest_checkpoint(run) is None, "weights that are lost"
    bad = json.loads((run / "bad_batch.json").read_text())
    said = capsys.readouterr().err
    assert f"the loss is not finite at step {bad['step']}; its samples are in {run / 'bad_batch.json'}" in said
    assert bad["step"] in (2, 3), "the weights after a step that was far too long"
    steps = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] is None, "a loss that is no number, in JSON that every reader takes"
    numbers = EpochPlan((30, 18), 12, 0, 0, 4096).batch(12 * (bad["step"] - 1)).sample.tolist()
    assert [sample["name"].split(":")[1] for sample in bad["samples"]] == [f"{number:06d}" for number in numbers]


def test_a_skipped_step_changes_neither_weights_nor_batch_statistics(shards: Path, tmp_path: Path) -> None:
    words = arguments(shards, tmp_path / "run", model__backbone="resnet18", data__image_size=32)
    recipe, _ = parse_recipe(words)
    place = init_process_group()
    model, _ = build_model(recipe.model, 32, len(read_manifest(shards).classes), 0)
    engine = build_engine(model, recipe, place, 12)
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 4
    good = Batch(images, labels, torch.ones(12), None, None, np.arange(12))
    poisoned = replace(good, images=good.images * float("inf"))
    bad_steps = BadSteps(1, tmp_path, Place(rank=0, world_size=1), lambda step: [f"sample of {step}"])

    cpu = torch.device("cpu")

    def step(batch: Batch, number: int) -> float:
        meter, objective = StepMeter(cpu, 1, 1), Objective(recipe.optim, [12] * 4, cpu)
        make = TrainStep(engine, make_forward(engine, recipe, cpu), objective, recipe, 1, 0, meter, bad_steps)
        return float(make(iter([batch]), 0.01, number))

    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    assert step(poisoned, 0) == 0
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    assert json.loads((tmp_path / "bad_batch.json").read_text())["samples"] == [{"rank": 0, "name": "sample of 0"}]
    assert step(good, 1) > 0
    after = dict(engine.module.named_parameters())
    assert not all(torch.equal(weight, before[name]) for name, weight in after.items())
    with pytest.raises(Exception, match=r"not finite at step 3 after train.skip_bad_steps \(1\) others"):
        step(poisoned, 2)
