"""The process in which the GPU suite measures: one for many points, as importing everything takes over ten seconds.

`Worker` is the suite's end of it. `python -m benchmarks.gpu_worker` reads points, one JSON object a line, and answers
each with its row, one JSON object a line. A point that fails is a row with "error". If what failed is not known to be
harmless, the next point has a new process, as after an error a GPU may be good for nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch

from benchmarks.points import environment_of_one_process
from dist_train.errors import UseError, WorkError

Row = dict[str, Any]

LEFT_LIMIT_MB = 16.0
"""What a point may leave allocated by torch; more is held by something that should be gone."""
_TOO_MUCH_MB = 1000.0  # more than this would change the next point's figures: that one gets a new process


class Worker:
    """A process that measures points one after the other, started when one is asked for and there is none."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.NamedTemporaryFile("r", errors="replace")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def measure(self, kind: str, arguments: Row, limit: float) -> Row:
        """Figures of a point, or {"error": one line}. Raises TimeoutError after `limit` seconds."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._start()
        process = self._process
        said_before = self._log.seek(0, os.SEEK_END)
        with suppress(BrokenPipeError):  # what it died of is read below
            process.stdin.write(json.dumps({"kind": kind} | arguments) + "\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], limit)
        if not ready:
            self._end()
            raise TimeoutError
        line = process.stdout.readline()
        row = json.loads(line) if line else {"error": self._last_words(process, said_before), "unusable": True}
        if "error" in row:
            self._log.seek(said_before)
            print("".join(self._log.readlines()[-30:]), end="", file=sys.stderr, flush=True)
        if row.pop("unusable", False) or row.get("left_mb", 0.0) > _TOO_MUCH_MB:
            self._end()
        return row

    def _start(self) -> None:
        with open(self._log.name, "a") as log:  # both ends have a place of their own in the file
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment_of_one_process(),
            )

    def _last_words(self, process: subprocess.Popen[str], said_before: int) -> str:
        """Why a process ended without an answer, in one line."""
        status = process.wait()
        self._log.seek(said_before)
        said = [line.strip() for line in self._log if line.strip()]
        how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how}: {said[-1]}" if said else how

    def _end(self) -> None:
        """End the process and what it has started, such as torch's compilers."""
        if self._process is None:
            return
        end_started_by(self._process.pid)
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None


def end_started_by(pid: int) -> None:
    """Kill all processes that a process has started."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def end_with_parent(parent: int) -> None:
    """End this process soon after the suite's has ended, however it did: the next one needs the GPU to itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    end_started_by(os.getpid())
    os._exit(1)


def main() -> None:
    """Answer points until the input ends."""
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    # What libraries print must not be taken for an answer, nor what their C code does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gpu = torch.cuda.is_available()
    for line in sys.stdin:
        point = json.loads(line)
        held = torch.cuda.memory_allocated() if gpu else 0
        row = row_of(point)
        if gpu and point["kind"] != "run":  # which does everything in processes of its own
            importlib.import_module("benchmarks.memory").free_memory()
            row["left_mb"] = round((torch.cuda.memory_allocated() - held) / 1e6, 2)
        print(json.dumps(row), file=answers, flush=True)


def kinds_of(kind: str) -> dict[str, Callable[[Row], Row]]:
    """What measures a kind of point, among others; only what is needed is imported."""
    module = {"steps": "points", "compile": "points", "loader": "points", "run": "run"}.get(kind, "checks")
    return importlib.import_module(f"benchmarks.gpu_{module}").KINDS


def row_of(point: Row) -> Row:
    """The row of a point, whatever happens: "unusable" says that this process may be of no use after it."""
    try:
        return kinds_of(point["kind"])[point["kind"]](point)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except (UseError, WorkError) as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {"error": f"{type(error).__name__}: {said}", "unusable": True}


if __name__ == "__main__":
    main()
