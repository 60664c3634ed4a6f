"""A supervised job is started again until its run is complete, and no run of another job is taken for its own."""

from __future__ import annotations

import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_train.cli import main
from dist_train.models.saved import newest_checkpoint
from dist_train.train.checkpoint import read_state
from tests import harness
from tests.harness import (
    REPOSITORY,
    environment,
    launcher,
    ranks_under,
    read_summary,
    steps_done,
    wait_for,
)

pytestmark = pytest.mark.usefixtures("nothing_stays")
arguments = partial(harness.arguments, optim__lr=0.01, train__epochs=1)


def supervise(*options: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "launch" / "supervise.py"), *options]


@pytest.mark.launch
def test_a_supervised_job_keeps_others_out_and_saves_and_ends_at_sigterm(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = arguments(shards, run, train__epochs=1000)
    job = subprocess.Popen(supervise("--", *launcher(2, options)), env=environment())
    wait_for(lambda: steps_done(run) >= 2, "step 2")
    ranks = ranks_under(job.pid)
    rank_0 = next(rank for rank in ranks if rank.environ()["RANK"] == "0")

    assert main(["train", *options, "--resume", "auto"]) == 1
    assert f"{run} is in use by process {rank_0.pid} on {socket.gethostname()}" in capsys.readouterr().err

    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 0
    assert not any(rank.is_running() for rank in ranks)
    assert read_state(newest_checkpoint(run)).step == steps_done(run)


def test_the_supervisor_gives_up_without_progress_and_at_wrong_use(tmp_path: Path) -> None:
    def starts(*command: str, restarts: int = 2, backoff: float = 0.05) -> tuple[int, int]:
        limits = f"--restarts={restarts}", f"--backoff={backoff}"
        options = supervise(*limits, "--", *command, f"--train.run={tmp_path / 'run'}")
        done = subprocess.run(options, env=environment(), capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr.count("supervise: start:")

    assert starts("false") == (1, 3)
    assert starts("true") == (1, 3)  # ends well, it says, but there is no run
    assert starts("sh", "-c", "exit 2") == (2, 1)
    assert starts("false", restarts=1100, backoff=0) == (1, 1101)  # more doublings than a float has


@pytest.mark.launch
def test_the_supervisor_takes_no_result_of_an_earlier_job_for_that_of_one_that_was_killed(
    shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def starts(command: Sequence[str], *more: str) -> tuple[int, int]:
        words = [*arguments(shards, run, train__epochs=1), *more]
        options = supervise("--restarts=0", "--backoff=0.05", "--", *command, *words)
        done = subprocess.run(options, env=environment(), capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr.count("supervise: start:")

    train = (sys.executable, str(REPOSITORY / "launch" / "train.py"))
    assert starts(train) == (0, 1)
    assert starts(train, "--resume", "auto") == (0, 1)  # nothing to do, it says
    # As the deepspeed launcher ends where a signal has killed what it started: before it had the folder, or after.
    assert starts(("true",), "--train.epochs=2", "--resume=auto") == (1, 1)
    hold = f"echo process 1 on here > {run / 'lock'}"
    assert starts(("sh", "-c", hold), "--train.epochs=2", "--resume=auto") == (1, 1)
    assert starts(train, "--train.epochs=2", "--resume=auto") == (0, 1)
    assert read_summary(run)["steps"] == steps_done(run)


def test_a_signal_that_comes_while_the_job_is_started_ends_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    start = subprocess.Popen

    def start_meanwhile(*words: Any, **options: Any) -> subprocess.Popen[bytes]:
        child = start(*words, **options)
        signal.raise_signal(signal.SIGTERM)
        return child

    try:
        stop = runpy.run_path(str(REPOSITORY / "launch" / "supervise.py"))["Stop"](tmp_path)
        monkeypatch.setattr(subprocess, "Popen", start_meanwhile)
        assert stop.run(["sleep", "20"]) == 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
