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
from dist_train.config import DataConfig, OptimConfig, Recipe, recipe_from_dict
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.train.settings import precision_of

ARMS = ("ours", "plain")
KNOWN = {
    "data": "shards cache cache_gb digest image_size crop_scale crop_ratio eval_crop eval_crop_pct brightness contrast "
    "saturation hue mean std streams shuffle_window device threads prefetch max_bad_samples max_pixels",
    "model": "backbone weights drop_path freeze checkpoint_blocks compile",
    "optim": "lr betas weight_decay layer_decay warmup_steps label_smoothing",
    "train": "run seed epochs batch_size micro_batch_size eval_batch_size eval_every monitor log_every "
    "keep_checkpoints timeout_s noise_every",
    "deepspeed": "precision zero_stage",
}
"""Keys of a recipe that the plain loop heeds, or that change no more in a run than its random numbers and rounding."""
PLAIN = Recipe(data=DataConfig(crop="random_resized"), optim=OptimConfig(name="adamw"))
"""What all other keys must be."""


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

    Raises UseError where the result has runs of another recipe or the plain loop would train otherwise than the recipe
    says, before anything is trained.
    """
    check_known(base)
    parameters = {"recipe": asdict(base), "seeds": arguments.seeds}
    manifest = read_manifest(base.data.shards)
    manifest.split("test")
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


def check_known(recipe: Recipe) -> None:
    """Raise UseError, naming the key, where the plain loop would train otherwise than the recipe says."""
    plain = asdict(PLAIN)
    odd = {
        f"{section}.{key}": value
        for section, values in asdict(recipe).items()
        for key, value in values.items()
        if key not in KNOWN[section].split() and value != plain[section][key]
    }
    model, precision = recipe.model, precision_of(recipe.deepspeed)
    if precision not in ("float32", "bf16_autocast"):
        odd["deepspeed.precision"] = precision
    if model.freeze != "none" and not model.freeze.isdecimal():
        odd["model.freeze"] = model.freeze
    if not (model.weights.endswith(".safetensors") and Path(model.weights).is_file()):
        odd["model.weights"] = model.weights
    if odd:
        named = ", ".join(f"{key} {value}" for key, value in odd.items())
        raise UseError(f"{named}: the plain loop does not know that; benchmarks/claims/plain_loop.py says what it does")


def _ours(recipe: Recipe, threads: int) -> Row:
    if not is_finished(recipe):
        log = Path(f"{recipe.train.run}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with Child("benchmarks.claims.runs:train_point", {"OMP_NUM_THREADS": str(threads)}, log=log) as child:
            if not child.ask(asdict(recipe)):
                raise WorkError(f"{recipe.train.run}: it was asked to stop; the same command continues it")
    return outcome(recipe)


def _plain(recipe: Recipe, manifest: Manifest, threads: int) -> Row:
    from dist_train.train.setup import with_normalisation

    root = Path(recipe.data.shards)
    splits = {name: [str(root / shard.file) for shard in split.shards] for name, split in manifest.splits.items()}
    recipe = with_normalisation(recipe)
    settings = asdict(recipe) | {"deepspeed": {"precision": precision_of(recipe.deepspeed)}}
    point = {"recipe": settings, "splits": splits, "classes": len(manifest.classes)}
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
