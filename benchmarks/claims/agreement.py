"""Whether a fine-tuning recipe reaches what a plain PyTorch loop with the same settings reaches, over several seeds."""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.claims.runs import comparable, is_finished, outcome, threads_of
from benchmarks.points import Child
from benchmarks.result import begun_document, write_result
from benchmarks.tables import Document, Row
from dist_train.config import Recipe, recipe_from_dict
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.output import say

ARMS = ("ours", "plain")


@dataclass(frozen=True)
class Arguments:
    """Train a recipe with several seeds, by this trainer and by a plain loop of torch, torchvision, timm and webdataset
    (benchmarks/claims/plain_loop.py). If it is stopped, the same command continues."""

    name: str
    """of the result: benchmarks/results/agreement/NAME.json"""
    seeds: int = 3
    """runs of each: seeds 0, 1, ..."""
    jobs: int = 1
    """runs at a time, on a share of the cores each; other threads add up in another order, no more"""


def run(arguments: Arguments, base: Recipe) -> Path:
    """Train both with every seed, a seed after the other. Writes the result after each run.

    Raises UseError where the result has runs of another recipe, before anything is trained.
    """
    parameters = {"recipe": asdict(base), "seeds": arguments.seeds}
    manifest = read_manifest(base.data.shards)
    document = begun_document("agreement", arguments.name)
    rows: list[Row] = document.get("rows", [])
    there = {(row["arm"], row["seed"]) for row in rows}
    threads = threads_of(arguments.jobs)
    if rows and comparable(recipe_from_dict(document["parameters"]["recipe"])) != comparable(base):
        raise UseError(f"--name {arguments.name}: this result has runs of another recipe; choose another name")

    def write() -> Path:
        return write_result("agreement", arguments.name, parameters, rows, {"difference": difference(rows)})

    def train(seed: int, arm: str) -> Row:
        recipe = replace(
            base,
            data=replace(base.data, threads=threads),
            train=replace(base.train, seed=seed, run=str(Path(base.train.run) / f"seed{seed}")),
        )
        found = _ours(recipe, threads) if arm == "ours" else _plain(recipe, manifest, threads)
        return {"arm": arm, "seed": seed, **found}

    path = write()
    left = [(seed, arm) for seed in range(arguments.seeds) for arm in ARMS if (arm, seed) not in there]
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        for future in as_completed([pool.submit(train, seed, arm) for seed, arm in left]):
            row = future.result()
            rows.append(row)
            path = write()
            say(f"{row['arm']}, seed {row['seed']}: test top-1 {row['top1']:.4f}")
    finally:
        pool.shutdown(cancel_futures=True)
    return path


def _ours(recipe: Recipe, threads: int) -> Row:
    if not is_finished(recipe):
        log = Path(f"{recipe.train.run}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with Child("benchmarks.claims.runs:train_point", {"OMP_NUM_THREADS": str(threads)}, log=log) as child:
            if not child.ask(asdict(recipe)):
                raise WorkError(f"{recipe.train.run}: it was asked to stop; the same command continues it")
    return outcome(recipe)


def _plain(recipe: Recipe, manifest: Manifest, threads: int) -> Row:
    root = Path(recipe.data.shards)
    splits = {name: [str(root / shard.file) for shard in split.shards] for name, split in manifest.splits.items()}
    point = {"recipe": asdict(recipe), "splits": splits, "classes": len(manifest.classes)}
    with Child("benchmarks.claims.plain_loop:train_point", {"OMP_NUM_THREADS": str(threads)}) as child:
        return child.ask(point)


def difference(rows: list[Row]) -> Row | None:
    """Ours less the plain loop in points of test top-1, with its standard error over the seeds: the two arms draw other
    random numbers, so their errors add up. None with fewer than two seeds of each."""
    ours, plain = ([100 * row["top1"] for row in rows if row["arm"] == arm] for arm in ARMS)
    if min(len(ours), len(plain)) < 2:
        return None
    error = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(plain) / len(plain))
    return {"points": statistics.mean(ours) - statistics.mean(plain), "standard_error": error, "seeds": len(ours)}


def headline(document: Document) -> str:
    """Both means, and their difference."""
    means = []
    for arm in ARMS:
        top1 = [100 * row["top1"] for row in document["rows"] if row["arm"] == arm]
        if not top1:
            return ""
        means.append(f"{arm} {statistics.mean(top1):.1f} %")
    apart = document.get("difference")
    known = f"; {apart['points']:+.2f} +- {apart['standard_error']:.2f} points" if apart else ""
    return f"Test top-1: {', '.join(means)}{known}"


BENCHMARK = Benchmark(
    "agreement", "Fine-tuning beside a plain PyTorch loop", Arguments, run, headline=headline, takes_recipe=True
)
