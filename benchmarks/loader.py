"""Data loaders side by side: images/s, processor time, memory and time to the first batch on the same shards.

Each contestant has a process of its own; they take turns for several rounds, so that whatever else the machine does
meets all of them. The loaders of other projects are in `benchmarks/peers/`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.peers import Task
from benchmarks.result import write_result
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError

# In the order of the table. The ceilings come last.
CONTESTANTS = {
    "ours": "this project",
    "ffcv_loader": "FFCV",
    "ffcv_no_jitter": "FFCV, no jitter",
    "dali_native": "DALI, its own reader and operators",
    "torchvision_v2": "torchvision v2 (tensors) + DataLoader",
    "torchvision_pil": "torchvision v2 (Pillow) + DataLoader",
    "timm_loader": "timm",
    "webdataset_library": "webdataset + torchvision v2 + DataLoader",
    "dali_decode": "ceiling: decode only",
    "bytes_only": "ceiling: bytes only",
}

# What this project's loader may cost a baked sample in batches of 256: microseconds of the thread that prepares batches
# (Python, not decoding) and of the one that trains, seconds from the start of a loader to its first batch.
LIMITS = {"host_us_per_sample": 10.0, "training_thread_us_per_sample": 1.0, "first_batch_s": 0.5}


@dataclass
class Contestant:
    """A running contestant: its process and what was measured of it."""

    name: str
    process: subprocess.Popen[str]
    rounds: list[dict[str, float]]
    first_batch_s: float = 0.0
    peak_mb: float = 0.0
    note: str = ""

    def ask(self, line: str) -> dict[str, Any]:
        """Its answer to one line. Raises WorkError if it ends instead."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            errors = Path(self.process.args[-1]).read_text().strip().splitlines()
            raise WorkError(f"{self.name}: {errors[-1] if errors else 'ended without a word'}") from None


def measure_loaders(task: Task, names: list[str], rounds: int, seconds: float, name: str, check: bool = False) -> Path:
    """Measure the named contestants and write the result; returns its path. What cannot run is reported in its row.

    check: raise WorkError afterwards if this project's loader is above its LIMITS. Raises UseError for a set of which
    no batch can be made.
    """
    images = read_manifest(task.shards).split("train").samples
    if task.batch_size > images:
        raise UseError(
            f"--batch {task.batch_size} is more than the {images} training images of {task.shards}; lower it"
        )
    Path(task.scratch).mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {contestant: {"loader": CONTESTANTS[contestant]} for contestant in names}
    with contextlib.ExitStack() as stack:
        running: list[Contestant] = []
        for contestant in names:
            started = stack.enter_context(_process(contestant, task))
            try:
                started.note = started.ask("prepare")["note"]
                started.first_batch_s = started.ask("start")["first_batch_s"]
            except WorkError as error:
                _leave_out(rows[contestant], error)
            else:
                running.append(started)
            _wait_for_idle(started)
        with tqdm(total=rounds * len(running), desc="loaders", disable=not sys.stderr.isatty()) as bar:
            for _ in range(rounds):
                for contestant in list(running):
                    try:
                        contestant.rounds.append(contestant.ask(f"run {seconds}"))
                    except WorkError as error:
                        _leave_out(rows[contestant.name], error)
                        running.remove(contestant)
                    _wait_for_idle(contestant)
                    bar.update()
        for contestant in running:
            contestant.peak_mb = _peak_memory(contestant, seconds)
            _wait_for_idle(contestant)
    ours = next((contestant for contestant in running if contestant.name == "ours"), None)
    for contestant in running:
        rows[contestant.name] |= _row(contestant, ours)
    parameters = {key: value for key, value in asdict(task).items() if key != "scratch"}
    path = write_result("loader", name, parameters | {"rounds": rounds, "seconds": seconds}, list(rows.values()))
    if check:
        check_limits(rows["ours"])
    return path


def _leave_out(row: dict[str, Any], error: WorkError) -> None:
    row["absent"] = str(error)
    print(f"left out {error}", file=sys.stderr)


def _row(contestant: Contestant, ours: Contestant | None) -> dict[str, Any]:
    rates = [run["images"] / run["seconds"] for run in contestant.rounds]
    row = {
        "images_per_s": round(statistics.median(rates), 1),
        "images_per_s_lowest": round(min(rates), 1),
        "images_per_s_highest": round(max(rates), 1),
        "cpu_s_per_1000": round(statistics.median(1000 * run["cpu_s"] / run["images"] for run in contestant.rounds), 3),
        "training_thread_us_per_sample": _us_per_sample(contestant, "taking_s"),
        "peak_mb": round(contestant.peak_mb),
        "first_batch_s": round(contestant.first_batch_s, 2),
        "note": contestant.note,
    }
    if contestant is ours:
        row["host_us_per_sample"] = _us_per_sample(contestant, "preparing_s")
    if ours:  # round by round, so that both figures of a ratio met the same machine
        ratios = [mine["images"] / mine["seconds"] / rate for mine, rate in zip(ours.rounds, rates, strict=True)]
        row["ours_is_times"] = round(statistics.median(ratios), 3)
    return row


def _us_per_sample(contestant: Contestant, clock: str) -> float:
    return round(statistics.median(1e6 * run[clock] / run["images"] for run in contestant.rounds), 2)


def check_limits(row: dict[str, Any]) -> None:
    """Raise WorkError naming every figure of this project's row that is above its limit."""
    above = [f"{name} {row[name]} is above {limit}" for name, limit in LIMITS.items() if not row[name] <= limit]
    if above:
        raise WorkError(f"{row['loader']}: {'; '.join(above)}; is the machine busy, or the batch small?")


@contextlib.contextmanager
def _process(name: str, task: Task) -> Iterator[Contestant]:
    with tempfile.NamedTemporaryFile("w+", suffix=f"-{name}.log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", name, json.dumps(asdict(task)), log.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Contestant(name, process, [])
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def _tree(contestant: Contestant) -> list[psutil.Process]:
    try:
        here = psutil.Process(contestant.process.pid)
        return [here, *here.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _wait_for_idle(contestant: Contestant) -> None:
    """Until its workers have filled their queues, so that they do not disturb the next one."""
    before = -1.0
    while (now := sum(sum(process.cpu_times()[:2]) for process in _tree(contestant))) - before > 0.02:
        before = now
        time.sleep(0.2)


def _peak_memory(contestant: Contestant, seconds: float) -> float:
    """MB that a run needs at most: private and shared memory, without mapped files, which the system can drop.

    A run of its own, as looking at the memory takes time.
    """
    peak = 0.0
    contestant.process.stdin.write(f"run {seconds}\n")
    contestant.process.stdin.flush()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        peak = max(peak, sum(_resident_mb(process.pid) for process in _tree(contestant)))
        time.sleep(0.1)
    contestant.process.stdout.readline()
    return peak


def _resident_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024
