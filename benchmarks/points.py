"""A point measured in a process of its own: a JSON object in, a JSON value out.

Every benchmark measures this way, so that memory, threads and what a library keeps in mind are a point's own. `Child`
is the parent's end, for one point or for many, one after the other; `python -m benchmarks.points MODULE:FUNCTION` is
the child's: it calls the function with each point, and answers with what that returns. However a child ends, the parent
gets an error of one line.
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
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.load import count_orphans, with_children
from dist_train.errors import UseError, WorkError

Point = Mapping[str, Any]


class ChildError(WorkError):
    """A point that raised what no point should. The child has ended."""


class ChildEnded(ChildError):
    """A child that ended without an answer. status: of the process, -9 where it was killed; said: what it wrote."""

    def __init__(self, status: int, said: str) -> None:
        how = f"ended by signal {-status}" if status < 0 else f"ended with status {status}"
        last = _last_line(said)
        super().__init__(f"{how}: {last.removeprefix('error: ')}" if last else how)
        self.status, self.said = status, said


class Child:
    """A process that measures points, started when one is asked for and there is none."""

    def __init__(
        self,
        function: str,
        environment: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
        within: Callable[[list[str]], list[str]] = list,
    ) -> None:
        """function: `package.module:function`. environment: variables to set beside this process's. log: a file that
        gets what the child and its libraries write (None: one that nobody else sees). within: the command that runs
        the child's, such as one that enters a namespace."""
        self.command = within([sys.executable, "-m", "benchmarks.points", function])
        self.environment = environment_of_one_process() | dict(environment or {})
        self.process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._log_path, self._asked_at = log, 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._log is not None:
            self._log.close()

    def ask(self, point: Point, limit: float | None = None) -> Any:
        """What the function makes of a point. limit: seconds to wait.

        Raises UseError and WorkError as the function does, ChildError for anything else that it raises, ChildEnded
        where the process ends instead, and TimeoutError after the limit. After the last three a next point gets a new
        process.
        """
        self.send(point)
        return self.receive(limit)

    def send(self, point: Point) -> None:
        """Ask for a point, to be received later."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None and self._log is not None
        self._asked_at = self._log.seek(0, os.SEEK_END)
        with suppress(BrokenPipeError):  # what it died of is read with the answer
            self.process.stdin.write(json.dumps(point) + "\n")
            self.process.stdin.flush()

    def receive(self, limit: float | None = None) -> Any:
        """The answer to the point that was sent; as `ask`."""
        process = self.process
        assert process is not None and process.stdout is not None
        if limit is not None and not select.select([process.stdout], [], [], max(0.0, limit))[0]:
            self.close()
            raise TimeoutError
        line = process.stdout.readline()
        if not line.endswith("\n"):  # cut off, or nothing at all
            status = process.wait()
            self.close()
            raise ChildEnded(status, self.said())
        answer = json.loads(line)
        if "failed" in answer:
            self.close()
            raise ChildError(answer["failed"])
        if "refused" in answer:
            raise (UseError if answer["use"] else WorkError)(answer["refused"])
        return answer["answer"]

    def said(self) -> str:
        """What was written to standard error since the last point was sent."""
        if self._log is None:
            return ""
        self._log.seek(self._asked_at)
        return self._log.read()

    def close(self) -> None:
        """End the process and what it has started, such as workers and compilers."""
        if self.process is None:
            return
        started = with_children(self.process.pid)[1:]
        count_orphans(started)
        self.process.kill()
        self.process.wait()
        kill(started)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # of what was not sent
                    stream.close()
        self.process = None

    def finish(self) -> None:
        """Let the process end by itself, which it does where nothing more is asked of it."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
        self.close()

    def _start(self) -> None:
        self.close()
        if self._log is None:
            if self._log_path is None:
                self._log = tempfile.NamedTemporaryFile("r", errors="replace")
            else:
                self._log_path.parent.mkdir(parents=True, exist_ok=True)
                self._log_path.touch()
                self._log = self._log_path.open(errors="replace")
        with open(self._log.name, "a") as log:  # both ends have a place of their own in the file
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )


def run_point(function: str, point: Point, environment: Mapping[str, str] | None = None) -> Any:
    """One point in a process of its own; as `Child.ask`."""
    with Child(function, environment) as child:
        return child.ask(point)


def environment_of_one_process() -> dict[str, str]:
    """The environment without a launcher's or an earlier run's description of ranks, for a measured process."""
    # The last where this process is one of a SLURM step's tasks.
    ranks = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT SLURM_STEP_NUM_TASKS".split()
    return {name: value for name, value in os.environ.items() if name not in ranks}


def gpu_environment(number: int) -> dict[str, str]:
    """What makes GPU `number` of those that this process sees (modulo their count) the only one of another process."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[number % count]}


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill those that have not ended."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# ---------------------------------------------------------------- in the child
def main(function: str) -> None:
    """Answer points until the input ends."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # What libraries print must not be taken for an answer, nor what their C code does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    measure = getattr(importlib.import_module(module), name)
    for line in sys.stdin:
        answer = answer_of(measure, json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
        if "failed" in answer:  # after such an error a GPU may be good for nothing
            return


def answer_of(measure: Callable[[Any], Any], point: Point) -> dict[str, Any]:
    """What the child writes, whatever happens."""
    try:
        return {"answer": measure(point)}
    except (UseError, WorkError) as error:
        return {"refused": str(error), "use": isinstance(error, UseError)}
    except Exception as error:
        traceback.print_exc()
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return {"failed": f"{type(error).__name__}: {said}"}


def _end_with_parent(parent: int) -> None:
    """End this process soon after its parent has ended, however it did: another one may need what it holds."""
    while os.getppid() == parent:
        time.sleep(0.5)
    kill(with_children(os.getpid())[1:])
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
