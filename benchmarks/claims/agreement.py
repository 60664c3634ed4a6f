"""Whether a fine-tuning recipe reaches what a plain PyTorch loop with the same settings reaches, over several seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.benchmark import Benchmark
from benchmarks.claims.runs import finish_runs, outcome
from benchmarks.points import Child
from benchmarks.result import read_rows, write_result
from benchmarks.tables import Document, Row
from dist_train.config import Recipe
from dist_train.data.manifest import Manifest, read_manifest
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


def run(arguments: Arguments, base: Recipe) -> Path:
    """Train both with every seed, a seed after the other. Writes the result after each run."""
    parameters = {"recipe": asdict(base), "seeds": arguments.seeds}
    manifest = read_manifest(base.data.shards)
    there = {(row["arm"], row["seed"]): row for row in read_rows("agreement", arguments.name)}
    rows: list[Row] = []
    path = write_result("agreement", arguments.name, parameters, list(there.values()))
    for seed in range(arguments.seeds):
        run_folder = str(Path(base.train.run) / f"seed{seed}")
        recipe = replace(base, train=replace(base.train, seed=seed, run=run_folder))
        for arm in ARMS:
            if (arm, seed) not in there:
                found = _ours(recipe) if arm == "ours" else _plain(recipe, manifest)
                there[arm, seed] = {"arm": arm, "seed": seed, **found}
            rows = list(there.values())
            path = write_result("agreement", arguments.name, parameters, rows, {"difference": difference(rows)})
            say(f"{arm}, seed {seed}: test top-1 {there[arm, seed]['top1']:.4f}")
    return path


def _ours(recipe: Recipe) -> Row:
    (finished,) = finish_runs([recipe], 1, "ours")
    return outcome(finished)


def _plain(recipe: Recipe, manifest: Manifest) -> Row:
    root = Path(recipe.data.shards)
    splits = {name: [str(root / shard.file) for shard in split.shards] for name, split in manifest.splits.items()}
    point = {"recipe": asdict(recipe), "splits": splits, "classes": len(manifest.classes)}
    with Child("benchmarks.claims.plain_loop:train_point") as child:
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
