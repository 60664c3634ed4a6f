"""Training runs to their end, several at a time on this machine, for the benchmarks that ask what something gains.

A finished run is its folder with `summary.json`; a sweep that was stopped continues with the runs that have none, each
from its newest checkpoint. A child process trains one run after the other, so that starting torch, DeepSpeed and DALI
is paid once and not for each of many short runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from benchmarks.points import Child, ChildEnded, gpu_environment
from dist_train.config import Recipe, recipe_from_dict
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.parse import recipe_from_run
from dist_train.train.settings import precision_of

SUMMARY_NAME = "summary.json"


def threads_of(jobs: int) -> int:
    """Of each of `jobs` processes that share this machine's cores. Raises UseError where there are none of them."""
    if jobs < 1:
        raise UseError(f"--jobs: {jobs} is not at least 1")
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def finish_runs(recipes: Sequence[Recipe], jobs: int, what: str) -> Iterator[Recipe]:
    """Train every recipe to its end, `jobs` at a time, and yield each as it is done; finished ones come first.

    On GPUs child i has GPU i mod their number; on the CPU the children share the cores. `what` is the progress bar's
    title. A run that fails is reported in a WorkError after all others. Where the caller stops, or Ctrl-C, no further
    run begins. Raises UseError where a run folder holds a run of another recipe, or of what a shard set was before the
    runs that are left, where a shard set has no test split, and as `threads_of` does.
    """
    threads = threads_of(jobs)
    left = [recipe for recipe in recipes if not is_finished(recipe)]
    finished = [recipe for recipe in recipes if recipe not in left]
    for shards in dict.fromkeys(recipe.data.shards for recipe in left):
        manifest = read_manifest(shards)
        if "test" not in manifest.splits:
            raise UseError(f"{shards}: no test split, so its runs would have no accuracy to compare")
        for recipe in finished:
            if recipe.data.shards == shards and read_summary(recipe)["manifest_digest"] != manifest.digest:
                raise UseError(
                    f"{recipe.train.run}: trained on what {shards} was before, so it cannot be compared with the runs "
                    "that are left; remove it, or name another folder for the runs"
                )
    bar = tqdm(total=len(recipes), initial=len(finished), desc=what, disable=not sys.stderr.isatty())
    yield from finished
    free: SimpleQueue[tuple[Child, Path]] = SimpleQueue()
    for number in range(min(jobs, len(left))):
        log = Path(left[0].train.run).parent / f"worker-{number}.log"
        environment = {"OMP_NUM_THREADS": str(threads)} | gpu_environment(number)
        free.put((Child("benchmarks.claims.runs:train_point", environment, log=log), log))
    failures = []

    def train_one(recipe: Recipe) -> str | None:
        """None, or why it failed in one line."""
        child, log = free.get()
        try:
            finished = child.ask(asdict(replace(recipe, data=replace(recipe.data, threads=threads))))
            return None if finished else "it was asked to stop"
        except ChildEnded as ended:
            return f"its process ended with status {ended.status}; see {log}"
        except (UseError, WorkError) as error:
            return str(error)
        finally:
            free.put((child, log))

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
            free.get()[0].finish()
    if failures:
        raise WorkError(
            f"{len(failures)} of {len(recipes)} runs failed; the same command tries them again. {failures[0]}"
        )


def train_point(point: dict[str, Any]) -> bool:
    """In the child: train a recipe. Returns whether it came to its end; asked to stop, it has saved and did not."""
    from dist_train.train.loop import train

    recipe = recipe_from_dict(point)
    train(recipe, "auto")
    return _summary_of(recipe).is_file()


def is_finished(recipe: Recipe) -> bool:
    """Whether the recipe's run folder holds its finished run. Raises UseError where it holds another recipe's."""
    run = Path(recipe.train.run)
    if not (run / "recipe.yaml").is_file():
        return False
    theirs = recipe_from_run(run)
    if recipe.train.micro_batch_size == "auto":  # what fitted when it was trained
        recipe = replace(recipe, train=replace(recipe.train, micro_batch_size=theirs.train.micro_batch_size))
    if comparable(theirs) != comparable(recipe):
        raise UseError(f"{run}: holds a run of another recipe; remove it, or name another folder for the runs")
    return _summary_of(recipe).is_file()


def comparable(recipe: Recipe) -> dict[str, Any]:
    """What decides the result of a run; precision, mean and deviation that are `auto`, as they are in the run."""
    if "auto" in (recipe.data.mean, recipe.data.std):
        from dist_train.train.setup import with_normalisation

        recipe = with_normalisation(recipe)
    values = asdict(recipe)
    values["deepspeed"]["precision"] = precision_of(recipe.deepspeed)
    for section, key in (
        ("model", "compile"),
        ("data", "threads"),
        ("data", "prefetch"),
        ("data", "cache"),
        ("train", "log_every"),
    ):
        del values[section][key]
    return values


def read_summary(recipe: Recipe) -> dict[str, Any]:
    """The `summary.json` of a finished run."""
    return json.loads(_summary_of(recipe).read_bytes())


def test_evaluation(recipe: Recipe) -> dict[str, Any]:
    """What a finished run reached on the test split. Raises UseError where its shard set has none."""
    evaluations = read_summary(recipe)["evaluations"]
    if "test" not in evaluations:
        raise UseError(f"{recipe.data.shards}: no test split, so {recipe.train.run} has no accuracy to compare")
    return evaluations["test"]


def trained_at(recipe: Recipe) -> str:
    """The commit that trained a finished run ("" outside of git): a sweep that was continued has runs of several."""
    return (read_summary(recipe)["commit"] or "")[:7]


def outcome(recipe: Recipe) -> dict[str, Any]:
    """What a finished run came to, for a row of a result. train_loss: of the last logged interval."""
    lines = (Path(recipe.train.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    train_loss = [entry for entry in map(json.loads, lines) if "lr" in entry][-1]["loss"]
    test = test_evaluation(recipe)
    return {
        "top1": test["top1"],
        "test_loss": test["loss"],
        "train_loss": train_loss,
        "trained_at": trained_at(recipe),
    }


def _summary_of(recipe: Recipe) -> Path:
    return Path(recipe.train.run) / SUMMARY_NAME
