"""A result says how much of the processor other processes took while it was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import load, result
from benchmarks.benchmark import Result
from benchmarks.catalogue import BENCHMARKS
from benchmarks.points import Child

BURN = "import time\nend = time.process_time() + {0}\nwhile time.process_time() < end: pass\nprint(flush=True)\ninput()"


@contextmanager
def busy(seconds: float, *, child: bool) -> Iterator[None]:
    """A process that has taken so much processor time and waits; started by this one, or else by nobody that lives."""
    command = [sys.executable, "-c", BURN.format(seconds)]
    if not child:
        between = "import subprocess, sys; subprocess.Popen(sys.argv[1:])"
        command = [sys.executable, "-c", between, *command]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate(b"\n")


def test_the_time_of_other_processes_is_counted_also_when_they_have_ended() -> None:
    before = load.seconds_of_others()
    with busy(0.6, child=False):
        pass
    assert load.seconds_of_others() - before > 0.4  # more where the machine has other work


def test_the_time_of_own_processes_is_taken_off_while_they_run_and_when_they_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine)
    before = load.seconds_of_others()
    with busy(0.6, child=True):
        assert before - load.seconds_of_others() > 0.5
    assert before - load.seconds_of_others() > 0.5


def burn_in_a_process_of_its_own(point: dict[str, Any]) -> None:
    """In a child: start a process that works, and leave it there."""
    process = subprocess.Popen([sys.executable, "-c", BURN.format(point["s"])], stdin=subprocess.PIPE, stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()


def test_the_time_of_what_a_child_has_started_is_taken_off_when_the_child_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as the workers of a loader: the child is killed before it could have seen them end."""
    machine = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine)
    before = load.seconds_of_others()
    with Child("tests.benchmarks.test_load:burn_in_a_process_of_its_own") as child:
        child.ask({"s": 0.6})
        started = load.with_children(child.process.pid)[1:] if child.process else []
        alone = before - load.seconds_of_others()
    assert alone > 0.6 and before - load.seconds_of_others() == pytest.approx(alone, abs=0.3)
    assert len(started) == 1 and not psutil.wait_procs(started, timeout=20)[1]


def test_the_share_is_of_all_cores_since_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, taken = [100.0], [7.0]
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(load, "seconds_of_others", lambda: taken[0])
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    others = load.OtherProcesses()
    now[0], taken[0] = 110.0, 7.0 + 3.0
    assert others.share() == 0.075
    assert capsys.readouterr().err == ""
    taken[0] = 7.0 + 30.0
    assert [others.share(), others.share()] == [0.75, 0.75]
    assert capsys.readouterr().err.splitlines() == [
        "note: other processes take 75% of the processor, which makes every time too long; "
        "where times matter, measure on an idle machine"
    ]


def test_a_continued_result_keeps_what_its_first_rows_were_measured_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(load, "seconds_of_others", lambda: 0.0)
    monkeypatch.setattr(result, "_OTHERS", load.OtherProcesses())
    path = result.write_result("step", "x", {}, [{"images_per_s": 1.0}])
    document = json.loads(path.read_bytes())
    assert document["busy_elsewhere"] == 0
    path.write_text(json.dumps(document | {"busy_elsewhere": 0.523}))
    for continued in (
        lambda: result.finished_rows("step", "x", {}),
        lambda: result.begun_document("step", "x")["rows"],
    ):
        monkeypatch.setattr(result, "_OTHERS", load.OtherProcesses())
        document = json.loads(result.write_result("step", "x", {}, continued()).read_bytes())
        assert document["busy_elsewhere"] == 0.523
    step = next(benchmark for benchmark in BENCHMARKS if benchmark.name == "step")
    assert Result(step, path, document).machine.endswith("of which other processes took 52% meanwhile")
    assert "other processes" not in Result(step, path, document | {"busy_elsewhere": 0.04}).machine
