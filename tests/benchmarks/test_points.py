"""A point runs in a child process: whatever the child does, its parent gets an answer or an error of one line."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.points import Child, ChildEnded, ChildError, environment_of_one_process, run_point
from dist_train.errors import UseError, WorkError


def behave(point: dict[str, Any]) -> Any:
    """In the child: do what the point says."""
    what = point["what"]
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        print("these words are the last", file=sys.stderr, flush=True)
        os._exit(3)
    if what == "hang":
        signal.pause()
    if what == "use":
        raise UseError("not this way")
    if what == "work":
        raise WorkError("it did not work")
    if what == "bug":
        raise ZeroDivisionError("by zero")
    print("a library says something")
    return {"pid": os.getpid(), "echo": point}


FUNCTION = "tests.benchmarks.test_points:behave"


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("die", ChildEnded, "ended by signal 9"),
        ("exit", ChildEnded, "ended with status 3: these words are the last"),
        ("use", UseError, "not this way"),
        ("work", WorkError, "it did not work"),
        ("bug", ChildError, "ZeroDivisionError: by zero"),
    ],
)
def test_however_a_child_fails_it_is_one_clear_line(what: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as raised:
        run_point(FUNCTION, {"what": what})
    assert str(raised.value) == said


def test_a_child_is_kept_as_long_as_it_is_of_use(tmp_path: Path) -> None:
    with Child(FUNCTION, {"A": "b"}, log=tmp_path / "logs" / "child.log") as child:
        first = child.ask({"what": "echo", "number": 1})
        assert first["echo"] == {"what": "echo", "number": 1}
        with pytest.raises(UseError):
            child.ask({"what": "use"})
        assert child.ask({"what": "echo"})["pid"] == first["pid"]
        with pytest.raises(TimeoutError):
            child.ask({"what": "hang"}, limit=0.3)
        second = child.ask({"what": "echo"})
        assert second["pid"] != first["pid"]
        with pytest.raises(ChildError):
            child.ask({"what": "bug"})
        assert child.ask({"what": "echo"})["pid"] != second["pid"]
    assert child.process is None
    assert "a library says something" in (tmp_path / "logs" / "child.log").read_text()


def test_a_child_is_no_rank_of_the_launchers_nor_a_task_of_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "2")
    left = environment_of_one_process()
    assert {"RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"}.isdisjoint(left) and left["SLURM_JOB_ID"] == "2"
