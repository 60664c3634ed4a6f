"""Training runs to their end, several at a time on this machine, for the benchmarks that ask what something gains.

A finished run is its folder with `summary.json`; a sweep that was stopped goes on with the runs that have none, each
from its newest checkpoint. A worker process trains one run after the other, so that starting torch, DeepSpeed and DALI
is paid once and not for each of many short runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from benchmarks.points import environment_of_one_process, gpu_environment
from benchmarks.step import recipe_from_dict
from dist_train.cli import recipe_from_run
from dist_train.config import Recipe
from dist_train.errors import UseError, WorkError, run_command
from dist_train.output import say
from dist_train.train.precision import precision_of

SUMMARY_NAME = "summary.json"
_ANSWER = "answer: "  # begins a worker's answer; libraries print too, some when they are imported


def finish_runs(recipes: Sequence[Recipe], jobs: int, what: str) -> Iterator[Recipe]:
    """Train every recipe to its end, `jobs` at a time, and yield each as it is done; finished ones come first.

    On GPUs worker i has GPU i mod their number; on the CPU the workers share the cores. `what` is the progress bar's
    title. A run that fails is reported in a WorkError after all others. Where the caller stops, or Ctrl-C, no further
    run begins. Raises UseError where a run folder holds a run of another recipe.
    """
    left = [recipe for recipe in recipes if not is_finished(recipe)]
    bar = tqdm(total=len(recipes), initial=len(recipes) - len(left), desc=what, disable=not sys.stderr.isatty())
    yield from (recipe for recipe in recipes if recipe not in left)
    free: SimpleQueue[Worker] = SimpleQueue()
    for number in range(min(jobs, len(left))):
        free.put(Worker(number, jobs, Path(left[0].train.run).parent))
    failures = []

    def train_one(recipe: Recipe) -> str | None:
        worker = free.get()
        try:
            return worker.train(recipe)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(max(1, jobs))
    try:
        futures = {pool.submit(train_one, recipe): recipe for recipe in left}
        for future in as_completed(futures):
            recipe, failure = futures[future], future.result()
            bar.update()
            if failure is None:
                say(f"{recipe.train.run}: test top-1 {test_evaluation(recipe)['top1']:.4f}")
                yield recipe
            else:
                failures.append(f"{recipe.train.run}: {failure}")
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        while not free.empty():
            free.get().close()
    if failures:
        raise WorkError(
            f"{len(failures)} of {len(recipes)} runs failed; the same command tries them again. {failures[0]}"
        )


def is_finished(recipe: Recipe) -> bool:
    """Whether the recipe's run folder holds its finished run. Raises UseError where it holds another recipe's."""
    run = Path(recipe.train.run)
    if not (run / "recipe.yaml").is_file():
        return False
    there = recipe_from_run(run)
    if comparable(there) != comparable(recipe):
        raise UseError(f"{run}: holds a run of another recipe; remove it, or name another folder for the runs")
    return (run / SUMMARY_NAME).is_file()


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What decides the result of a run; what is `auto` in it, as it is on this machine."""
    values = asdict(replace(recipe, deepspeed=replace(recipe.deepspeed, precision=precision_of(recipe.deepspeed))))
    del values["model"]["compile"]
    for section, key in (("data", "threads"), ("data", "prefetch"), ("data", "cache"), ("train", "log_every")):
        del values[section][key]
    return values


def read_summary(recipe: Recipe) -> dict[str, Any]:
    """The `summary.json` of a finished run."""
    return json.loads((Path(recipe.train.run) / SUMMARY_NAME).read_bytes())


def test_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What a finished run reached on the test split. Raises UseError where its shard set has none."""
    evaluations = read_summary(recipe)["evaluations"]
    if "test" not in evaluations:
        raise UseError(f"{recipe.data.shards}: no test split, so {recipe.train.run} has no accuracy to compare")
    return evaluations["test"]


def trained_at(recipe: Recipe) -> str:
    """The commit that trained a finished run ("" outside of git): a sweep that went on later has runs of several."""
    return (read_summary(recipe)["commit"] or "")[:7]


def last_train_loss(recipe: Recipe) -> float:
    """The training loss of the last logged interval of a run."""
    lines = (Path(recipe.train.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "lr" in entry]
    return steps[-1]["loss"]


class Worker:
    """A process that trains one recipe after the other; it is started when first needed, and again if it died."""

    def __init__(self, number: int, of: int, logs: Path) -> None:
        """Worker `number` of `of`; what it prints goes to a file in the folder `logs`."""
        cores = max(1, len(os.sched_getaffinity(0)) // of)
        self._environment = environment_of_one_process() | {"OMP_NUM_THREADS": str(cores)} | gpu_environment(number)
        self._threads = cores
        self._log = logs / f"worker-{number}.log"
        self._process: subprocess.Popen[str] | None = None

    def train(self, recipe: Recipe) -> str | None:
        """Train to the end. Returns None, or why it failed in one line."""
        if self._process is None or self._process.poll() is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.accuracy"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=self._environment,
                )
        assert self._process.stdin is not None and self._process.stdout is not None
        recipe = replace(recipe, data=replace(recipe.data, threads=self._threads))
        try:
            self._process.stdin.write(json.dumps(asdict(recipe)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, as its output says
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return json.loads(line.removeprefix(_ANSWER))
        return f"its process ended with status {self._process.wait()}; see {self._log}"

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it was killed
                self._process.stdin.close()
            self._process.wait()


def serve() -> int:
    """Train the recipes that come in, a line of JSON each, and answer each with a line: null, or why it failed."""
    from dist_train.train.loop import train

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints from here on is no answer
    for line in sys.stdin:
        recipe, failure = recipe_from_dict(json.loads(line)), None
        try:
            train(recipe, "auto")
        except (UseError, WorkError) as error:
            failure = str(error)
        else:
            if not (Path(recipe.train.run) / SUMMARY_NAME).is_file():
                return 0  # asked to stop: the run has saved and goes on another time
        print(f"{_ANSWER}{json.dumps(failure)}", file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(serve))
