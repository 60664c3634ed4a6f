"""A run that is killed again and again: does it end as if nothing had happened?

A tiny model is trained twice on the same shard set: undisturbed, and killed with SIGKILL at random moments within
steps, evaluations and the writing of checkpoints, going on each time with --resume auto. Weights must be equal bit for
bit, and the samples of all steps that count must be each sample once per epoch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.result import write_result
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.errors import WorkError, run_command
from dist_train.files import write_atomically
from dist_train.models.saved import list_checkpoints, newest_checkpoint, read_weights

PHASES = {"step": 0.03, "evaluation": 0.04, "checkpoint": 0.03}  # the longest delay of a kill into it, seconds
_BATCH = 24


def measure_kills(shards: Path, ranks: int, kills: int, epochs: int, seed: int, scratch: Path, name: str) -> Path:
    """Run the study on a shard set and write its result; returns the result's path.

    Raises WorkError where weights or samples differ, or the run was complete before it was killed `kills` times.
    """
    row = study_kills(shards, ranks, kills, epochs, seed, scratch)
    path = write_result("kill", name, {"shards": str(shards), "epochs": epochs, "batch": _BATCH, "seed": seed}, [row])
    if not (row["identical_weights"] and row["each_sample_once"]):
        raise WorkError(f"{path}: the killed run did not end as the undisturbed one")
    return path


def study_kills(shards: Path, ranks: int, kills: int, epochs: int, seed: int, scratch: Path) -> dict[str, Any]:
    """The row of the result: what was killed, and whether the killed run ended as the undisturbed one."""
    started = time.perf_counter()
    straight, killed = scratch / "straight", scratch / "killed"
    for run in (straight, killed):
        shutil.rmtree(run, ignore_errors=True)
    _train(shards, straight, ranks, epochs, None)
    moments = _moments(kills, seed)
    within: Counter[str] = Counter()
    half_written = steps_lost = 0
    for moment in moments:
        open_phases = _train(shards, killed, ranks, epochs, moment)
        if open_phases is None:
            raise WorkError(f"the run was complete after {within.total()} of {kills} kills; give it more --epochs")
        within[next((phase for phase in ("checkpoint", "evaluation", "step") if phase in open_phases), "between")] += 1
        half_written += bool(list((killed / "checkpoints").glob("*.tmp")))
        kept = int(list_checkpoints(killed)[-1].name.removeprefix("step-")) if list_checkpoints(killed) else 0
        steps_lost += max(_read_samples(killed, 0), default=0) - kept
    _train(shards, killed, ranks, epochs, None)
    one, other = (read_weights(newest_checkpoint(run)) for run in (straight, killed))
    return {
        "ranks": ranks,
        "kills": kills,
        **{f"in_{phase}": within[phase] for phase in (*PHASES, "between")},
        "half_written": half_written,
        "steps": max(_read_samples(straight, 0)),
        "steps_lost": steps_lost,
        "identical_weights": one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one),
        "each_sample_once": _each_once(killed, ranks, read_manifest(shards).split("train").samples)
        and all(_read_samples(straight, rank) == _read_samples(killed, rank) for rank in range(ranks)),
        "seconds": round(time.perf_counter() - started),
    }


def _moments(kills: int, seed: int) -> list[tuple[str, int, float]]:
    """(phase, the how-manieth of the process, seconds into it), each phase as often as the others."""
    draw = random.Random(seed)
    phases = [list(PHASES)[i % len(PHASES)] for i in range(kills)]
    draw.shuffle(phases)
    return [(phase, draw.randint(1, 10 if phase == "step" else 2), draw.uniform(0, PHASES[phase])) for phase in phases]


def _train(shards: Path, run: Path, ranks: int, epochs: int, moment: tuple[str, int, float] | None) -> list[str] | None:
    """Start or go on with the run; kill all of its ranks at the moment. Returns the phases that rank 0 was in when it
    was killed, None if the run came to its end."""
    # Forked from a process that has imported everything: a start costs a second instead of ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dist_train.cli", "dist_train.train.loop", __name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    marks, send = context.Pipe(duplex=False)
    options = _options(shards, run, epochs)
    processes = [
        context.Process(target=_run_rank, args=(rank, ranks, port, run, options, send if rank == 0 else None))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    send.close()
    entered: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for phase, event in _received(marks):
        (entered if event == "begin" else left)[phase] += 1
        if moment and event == "begin" and (phase, entered[phase]) == moment[:2]:
            time.sleep(moment[2])
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)
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


def _options(shards: Path, run: Path, epochs: int) -> list[str]:
    keys = {
        "data.shards": shards,
        "data.image_size": 16,
        "data.crop_margin": 4,
        "data.shuffle_window": 16,
        "data.threads": 1,
        "model.backbone": "vit_tiny_patch8",
        "model.dropout": 0.1,
        "optim.name": "adamw",
        "train.run": run,
        "train.epochs": epochs,
        "train.batch_size": _BATCH,
        "train.log_every": 1,
    }
    return [*(f"--{key}={value}" for key, value in keys.items()), "--resume=auto"]


# ---------------------------------------------------------------------- within a rank
def _run_rank(rank: int, ranks: int, port: int, run: Path, options: list[str], marks: Connection | None) -> None:
    """One rank of the run: says through `marks` where it is and records the samples of each of its steps."""
    from dist_train.cli import run_training
    from dist_train.train import loop
    from dist_train.train.checkpoint import CheckpointWriter
    from dist_train.train.step import TrainStep

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({key: str(value) for key, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    sys.stderr = open(os.devnull, "w")
    loop.TrainLoader = type("RecordedLoader", (_RecordedLoader,), {"file": _samples_file(run, rank)})
    if marks is not None:
        TrainStep.__call__ = _marked("step", TrainStep.__call__, marks)
        loop.evaluate_split = _marked("evaluation", loop.evaluate_split, marks)
        CheckpointWriter._write = _marked("checkpoint", CheckpointWriter._write, marks)
    sys.exit(run_command(lambda: run_training(options)))


def _marked(phase: str, function: Callable[..., Any], marks: Connection) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        marks.send((phase, "begin"))
        answer = function(*arguments, **named)
        marks.send((phase, "end"))
        return answer

    return marked


class _RecordedLoader(TrainLoader):
    """Appends a line per micro-batch, the step and its samples, to a file, without those after the resumed step."""

    file: Path

    def __iter__(self) -> Iterator[Batch]:
        done = self.start // self.plan.batch_size
        before = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        write_atomically(self.file, "".join(line for line in before if json.loads(line)[0] <= done).encode())
        with open(self.file, "a", buffering=1) as file:
            for step, batch in enumerate(super().__iter__(), done + 1):
                file.write(json.dumps([step, batch.samples.tolist()]) + "\n")
                yield batch


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
        epochs = step * _BATCH // samples
        if set(times.values()) - {epochs, epochs + 1}:
            return False
    return len(times) == samples
