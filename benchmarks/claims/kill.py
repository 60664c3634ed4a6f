"""A run that is killed again and again: does it end as if nothing had happened?

A tiny model is trained twice on the same shard set: undisturbed, and killed with SIGKILL at random moments within
steps, evaluations and the writing of checkpoints, and continued each time with --resume auto. Weights must be equal bit
for bit, and the samples of all steps that count must be each sample once per epoch.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, figures
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError

PHASES = {"step": 0.03, "evaluation": 0.04, "checkpoint": 0.03}  # the longest delay of a kill into it, seconds
BATCH = 24


@dataclass(frozen=True)
class Arguments:
    """Kill a tiny run with SIGKILL at random moments, resume it each time, and compare how it ends."""

    shards: Path
    """a shard set with a train and a val split"""
    name: str
    """of the result: benchmarks/results/kill/NAME.json"""
    ranks: int = 1
    """of the run"""
    kills: int = 20
    """of all ranks at once"""
    epochs: int = 60
    """of the run, several a kill"""
    seed: int = 0
    """of the moments"""
    scratch: Path = Path("runs/kill")
    """folder for the two runs"""


@dataclass(frozen=True)
class Moment:
    """When a run is killed: in which phase, its number in the process from 1, and seconds into it."""

    phase: str
    number: int
    delay: float


def run(arguments: Arguments) -> Path:
    """Run the study on a shard set and write its result.

    Raises WorkError where weights or samples differ, or the run was complete before it was killed `kills` times.
    """
    row = study_kills(arguments)
    parameters = {"shards": str(arguments.shards), "epochs": arguments.epochs, "batch": BATCH, "seed": arguments.seed}
    path = write_result("kill", arguments.name, parameters, [row])
    if not (row["identical_weights"] and row["each_sample_once"]):
        raise WorkError(f"{path}: the killed run did not end as the undisturbed one")
    return path


def study_kills(arguments: Arguments) -> Row:
    """The row of the result: what was killed, and whether the killed run ended as the undisturbed one."""
    from dist_train.models.saved import list_checkpoints, read_weights

    started = time.perf_counter()
    ranks, kills = arguments.ranks, arguments.kills
    if ranks < 1 or BATCH % ranks:
        raise UseError(f"--ranks: {ranks} does not divide the batch of {BATCH}")
    manifest = read_manifest(arguments.shards)
    manifest.split("val")  # else no evaluation could be killed
    straight, killed = (arguments.scratch / f"{ranks}-ranks" / name for name in ("straight", "killed"))
    for run in (straight, killed):
        shutil.rmtree(run, ignore_errors=True)
    _train(arguments, straight, None)
    within: Counter[str] = Counter()
    half_written = steps_lost = 0
    for moment in _moments(kills, arguments.seed):
        open_phases = _train(arguments, killed, moment)
        if open_phases is None:
            raise WorkError(f"the run was complete after {within.total()} of {kills} kills; give it more --epochs")
        within[next((phase for phase in ("checkpoint", "evaluation", "step") if phase in open_phases), "between")] += 1
        half_written += bool(list((killed / "checkpoints").glob("*.tmp")))
        kept = int(list_checkpoints(killed)[-1].name.removeprefix("step-")) if list_checkpoints(killed) else 0
        steps_lost += max(_read_samples(killed, 0), default=0) - kept
    _train(arguments, killed, None)
    one, other = (read_weights(list_checkpoints(run)[-1]) for run in (straight, killed))
    return {
        "ranks": ranks,
        "kills": kills,
        **{f"in_{phase}": within[phase] for phase in (*PHASES, "between")},
        "half_written": half_written,
        "steps": max(_read_samples(straight, 0)),
        "steps_lost": steps_lost,
        "identical_weights": one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one),
        "each_sample_once": _each_once(killed, ranks, manifest.split("train").samples)
        and all(_read_samples(straight, rank) == _read_samples(killed, rank) for rank in range(ranks)),
        "seconds": round(time.perf_counter() - started),
    }


def _moments(kills: int, seed: int) -> list[Moment]:
    """Each phase as often as the others."""
    draw = random.Random(seed)
    phases = [list(PHASES)[i % len(PHASES)] for i in range(kills)]
    draw.shuffle(phases)
    return [Moment(p, draw.randint(1, 10 if p == "step" else 2), draw.uniform(0, PHASES[p])) for p in phases]


def _train(arguments: Arguments, run: Path, moment: Moment | None) -> list[str] | None:
    """Start the run or continue it; kill all of its ranks at the moment. Returns the phases that rank 0 was in when it
    was killed, None if the run came to its end."""
    from benchmarks.claims.kill_rank import run_rank

    # Forked from a process that has imported everything: a start costs a second instead of ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.cli", "benchmarks.claims.kill_rank"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    marks, send = context.Pipe(duplex=False)
    processes = []
    ranks = arguments.ranks
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
        given = (environment, _samples_file(run, rank), _options(arguments, run), None if rank else send)
        processes.append(context.Process(target=run_rank, args=given))
    for process in processes:
        process.start()
    send.close()
    entered: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for phase, event in _received(marks):
        (entered if event == "begin" else left)[phase] += 1
        if moment and event == "begin" and (phase, entered[phase]) == (moment.phase, moment.number):
            time.sleep(moment.delay)
            for process in processes:
                process.kill()
            moment = None
    for process in processes:
        process.join()
    codes = {process.exitcode for process in processes}
    if codes == {0}:
        return None
    if codes != {-signal.SIGKILL}:
        raise WorkError(f"{run / 'log.txt'}: the run ended with {codes}")
    return [phase for phase in entered if entered[phase] > left[phase]]


def _received(marks: Connection) -> Iterator[tuple[str, str]]:
    while True:
        try:
            yield marks.recv()
        except EOFError:
            return


def _options(arguments: Arguments, run: Path) -> list[str]:
    keys = {
        "data.shards": arguments.shards,
        "data.image_size": 16,
        "data.crop_margin": 4,
        "data.shuffle_window": 16,
        "data.threads": 1,
        "model.backbone": "vit_tiny_patch8",
        "model.dropout": 0.1,
        "optim.name": "adamw",
        "train.run": run,
        "train.epochs": arguments.epochs,
        "train.batch_size": BATCH,
        "train.log_every": 1,
    }
    return [*(f"--{key}={value}" for key, value in keys.items()), "--resume=auto"]


def _samples_file(run: Path, rank: int) -> Path:
    return run / f"samples-{rank}.jsonl"


def _read_samples(run: Path, rank: int) -> dict[int, list[int]]:
    """{step: samples} of a rank; {} before its first. Raises WorkError where a step stands twice."""
    file = _samples_file(run, rank)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if len({step for step, _ in lines}) != len(lines):
        raise WorkError(f"{file}: a step stands in it twice")
    return dict(lines)


def _each_once(run: Path, ranks: int, samples: int) -> bool:
    """Whether, after every step, each sample was used once per complete epoch and at most once in the one begun."""
    by_rank = [_read_samples(run, rank) for rank in range(ranks)]
    times = dict.fromkeys(range(samples), 0)
    for step in range(1, len(by_rank[0]) + 1):
        for sample in (sample for rank in by_rank for sample in rank[step]):
            times[sample] += 1
        epochs = step * BATCH // samples
        if set(times.values()) - {epochs, epochs + 1}:
            return False
    return True


def headline(document: Document) -> str:
    """How often was killed what, and how it ended."""
    rows = document["rows"]
    kills = figures(rows, "kills")
    if not kills:
        return ""
    same = all(row.get("identical_weights") is True and row.get("each_sample_once") is True for row in rows)
    end = "weights bit-identical, each sample once per epoch" if same else "not all ended as the undisturbed run"
    ranks = ", ".join(f"{rank:g} rank{'s' * (rank != 1)}" for rank in figures(rows, "ranks"))
    return f"{sum(kills):,} kills{f' on {ranks}' if ranks else ''}: {end}"


COLUMNS = [
    ("ranks", "ranks", "d"),
    ("kills", "kills", "d"),
    ("in_step", "in a step", "d"),
    ("in_evaluation", "in an evaluation", "d"),
    ("in_checkpoint", "in a checkpoint", "d"),
    ("in_between", "between", "d"),
    ("half_written", "checkpoints left half-written", "d"),
    ("steps", "steps", "d"),
    ("steps_lost", "steps made again", "d"),
    ("identical_weights", "weights bit-identical", ""),
    ("each_sample_once", "each sample once per epoch", ""),
    ("seconds", "seconds", ",d"),
]
BENCHMARK = Benchmark(
    "kill", "A run killed again and again beside an undisturbed one", Arguments, run, COLUMNS, headline
)
