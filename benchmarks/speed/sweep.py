"""The sweep of the benchmark `batch_size`: its points, what is measured of each, and which of them are trained."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.points import gpu_environment
from benchmarks.result import finished_rows, write_result
from benchmarks.speed import step
from benchmarks.speed.fit import largest_micro_batch
from benchmarks.tables import Row, describe_row
from dist_train.config import Compile, Head, Recipe
from dist_train.data.manifest import read_manifest
from dist_train.data.plan import micro_batch_of
from dist_train.errors import UseError
from dist_train.output import say

START_S, COMPILE_S = 12.0, 30.0  # of a measuring process, roughly; only the printed plan uses it
RUN = ("backbone", "head", "image_size", "batch_size")  # what tells one training from another
UTILISATION = 0.5  # of the matrix-product rate, likewise


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, and what is asked of each.

    compile: values of model.compile; none beside graphs shows what of a step is the host's and what the GPU's.
    micro_batch: also measure each batch accumulated from micro-batches of this many (0: not). search: find the largest
    micro-batch that fits, up to this many (0: not). memory_gb: what a process may take, 10**9 bytes (0: what there is).
    price_per_hour: of the device. tolerance: points of top-1 that the recommended batch may be below the best.
    """

    backbones: tuple[str, ...]
    heads: tuple[Head, ...]
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    compile: tuple[Compile, ...] = ("none",)
    arm: step.Arm = "synthetic"
    micro_batch: int = 0
    search: int = 0
    memory_gb: float = 0.0
    price_per_hour: float | None = None
    accuracy: bool = False
    tolerance: float = 1.0
    warmup: int = 2
    steps: int = 10


def measure_batch_sizes(base: Recipe, sweep: Sweep, jobs: int, name: str) -> Path:
    """Measure every point that is not yet in the result, train if asked to, and return the path of the result.

    jobs: points at a time, each on a GPU of its own.
    """
    samples = samples_per_epoch(base)
    recipes = list(points(base, sweep))
    if sweep.accuracy:
        check_training(base, recipes)
    parameters = {"recipe": asdict(base), "sweep": asdict(sweep), "samples_per_epoch": samples}
    there = {key_of(row): row for row in finished_rows("batch_size", name, parameters)}
    left = [recipe for recipe in recipes if key_of(describe(recipe)) not in there]
    say(describe_plan(left, len(recipes), sweep, samples))
    rows = list(there.values())
    path = write_result("batch_size", name, parameters, rows)

    free: SimpleQueue[int] = SimpleQueue()
    for number in range(jobs):
        free.put(number)

    def measure(recipe: Recipe) -> Row:
        number = free.get()
        try:
            return measure_point(recipe, sweep, samples, gpu_environment(number))
        finally:
            free.put(number)

    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(measure, left):
            rows.append(row)
            path = write_result("batch_size", name, parameters, rows)
            say(describe_row(row, f"{row['backbone']} {row['head']} batch {row['batch_size']}"))
    for _ in search_micro_batches(rows, recipes, sweep) if sweep.search else ():
        path = write_result("batch_size", name, parameters, rows)
    if sweep.accuracy:
        from benchmarks.claims.runs import finish_runs

        for recipe in finish_runs(recipes_to_train(recipes, rows), jobs, "accuracy"):
            add_accuracy(rows, recipe)
            mark_front(rows, sweep.tolerance)
            path = write_result("batch_size", name, parameters, rows)
    return path


def check_training(base: Recipe, recipes: list[Recipe]) -> None:
    """Raise UseError where a point could not be trained to its end and compared: before anything is measured."""
    from dist_train.train.schedule import check_schedule, count_steps

    manifest = read_manifest(base.data.shards)
    manifest.split("test")
    samples = manifest.split("train").samples
    for recipe in recipes:
        try:
            check_schedule(recipe.optim, count_steps(recipe.train.epochs, samples, recipe.train.batch_size))
        except UseError as error:
            raise UseError(f"batch size {recipe.train.batch_size}: {error}") from None


def points(base: Recipe, sweep: Sweep) -> Iterator[Recipe]:
    """The recipe of every point."""
    folder = Path(base.train.run)
    for backbone in sweep.backbones:
        for head in sweep.heads:
            for size in sweep.sizes:
                for batch in sweep.batches:
                    run = folder / f"{backbone}-{head}-{size}px-batch{batch}"
                    micros = (0, sweep.micro_batch) if 0 < sweep.micro_batch < batch else (0,)
                    for micro, compile in product(micros, sweep.compile):
                        if micro and batch % micro:
                            raise UseError(f"--micro-batch {micro} does not divide the batch size {batch}")
                        yield replace(
                            base,
                            data=replace(base.data, image_size=size),
                            model=replace(base.model, backbone=backbone, head=head, compile=compile),
                            train=replace(base.train, batch_size=batch, micro_batch_size=micro, run=str(run)),
                        )


def describe(recipe: Recipe) -> Row:
    """What tells one point from another."""
    micro = micro_batch_of(recipe.train.batch_size, 1, recipe.train.micro_batch_size)
    return {
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "image_size": recipe.data.image_size,
        "batch_size": recipe.train.batch_size,
        "micro_batch": micro,
        "accumulation": recipe.train.batch_size // micro,
        "compile": recipe.model.compile,
        "precision": recipe.deepspeed.precision,
    }


def key_of(row: Row) -> tuple[Any, ...]:
    """The point that a row is of."""
    return tuple(row[key] for key in (*RUN, "micro_batch", "compile"))


def is_accumulated(recipe: Recipe) -> bool:
    """Whether the batch is made of several micro-batches, which changes nothing in what is learnt."""
    return recipe.train.micro_batch_size not in (0, recipe.train.batch_size)


def measure_point(recipe: Recipe, sweep: Sweep, samples: int, environment: dict[str, str]) -> Row:
    """One row: cost of a step and of an epoch."""
    row = describe(recipe)
    limit = int(sweep.memory_gb * 1e9)
    measured = step.measure(recipe, sweep.arm, sweep.warmup, sweep.steps, environment, limit)
    if measured.get("out_of_memory") is True:
        row["out_of_memory"] = True
    else:
        minutes = samples / measured["images_per_s"] / 60
        row |= {key: measured[key] for key in ("step_ms", "step_ms_p95", "images_per_s")}
        row |= {"peak_mb": measured["memory_mb"], "saved_activations_mb": measured.get("saved_activations_mb")}
        row |= {"mfu_of_matmul": measured.get("mfu_of_matmul"), "epoch_minutes": round(minutes, 3)}
        row["train_minutes"] = round(minutes * recipe.train.epochs, 3)
        for what in ("epoch", "train") if sweep.price_per_hour is not None else ():
            row[f"{what}_price"] = round(row[f"{what}_minutes"] / 60 * (sweep.price_per_hour or 0), 4)
    return row


def search_micro_batches(rows: list[Row], recipes: list[Recipe], sweep: Sweep) -> Iterator[None]:
    """Find each model's largest micro-batch, which is the same at every batch size, and put it into its rows."""
    model_of = itemgetter("backbone", "head", "image_size")
    for recipe in {model_of(describe(recipe)): recipe for recipe in recipes}.values():
        mine = [row for row in rows if model_of(row) == model_of(describe(recipe))]
        if any("largest_micro_batch" not in row for row in mine):
            largest = largest_micro_batch(recipe, sweep.search, {}, int(sweep.memory_gb * 1e9))
            for row in mine:
                row["largest_micro_batch"] = largest
            yield


def samples_per_epoch(recipe: Recipe) -> int:
    """Samples of the train split of the recipe's shard set, or the paper's where the set is not there."""
    try:
        return read_manifest(recipe.data.shards).split("train").samples
    except UseError:
        return step.PAPER_SAMPLES


def describe_plan(left: list[Recipe], total: int, sweep: Sweep, samples: int) -> str:
    """What will be measured and trained, and roughly how long it takes."""
    import torch

    from dist_train.models.build import build_model
    from dist_train.train.inputs import one_sample
    from dist_train.train.meters import matmul_rate, training_flops_per_sample
    from dist_train.train.precision import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = training = 0.0
    rates: dict[tuple[str, int], float] = {}
    for recipe in left:
        model = (recipe.model.backbone, recipe.data.image_size)
        if model not in rates:
            config = replace(recipe.model, weights="none")
            vocabulary = step.SYNTHETIC_VOCABULARY if config.text_tokens else 0
            network = build_model(config, recipe.data.image_size, step.PAPER_CLASSES, vocabulary)[0]
            flops = training_flops_per_sample(network, *one_sample(recipe))
            rates[model] = UTILISATION * matmul_rate(device, compute_dtype(recipe.deepspeed)) / flops
        seconds += START_S + (COMPILE_S if recipe.model.compile != "none" else 0.0)
        seconds += (sweep.warmup + sweep.steps) * recipe.train.batch_size / rates[model]
        if sweep.accuracy and not is_accumulated(recipe):
            training += recipe.train.epochs * samples / rates[model]
    searched = ", without the search for the largest micro-batch" if sweep.search else ""
    lines = [f"{len(left)} of {total} points to measure, about {seconds / 60:.0f} minutes{searched}"]
    if training:
        lines.append(
            f"training to the end at each batch size, about {training / 3600:.1f} hours where nothing is done yet"
        )
    return "\n".join(lines)


def recipes_to_train(recipes: list[Recipe], rows: list[Row]) -> list[Recipe]:
    """One recipe for each model, head, image size and batch: with the fastest of the micro-batches and values of
    model.compile that fit."""
    by_key = {key_of(row): row for row in rows}
    fastest: dict[tuple[Any, ...], Recipe] = {}
    for recipe in recipes:
        row = by_key[key_of(describe(recipe))]
        run = tuple(row[key] for key in RUN)
        best = fastest.get(run)
        if "step_ms" in row and (best is None or row["step_ms"] < by_key[key_of(describe(best))]["step_ms"]):
            fastest[run] = recipe
    return list(fastest.values())


def add_accuracy(rows: list[Row], recipe: Recipe) -> None:
    """Put the test accuracy of a finished run into its row, and into those of the same batch made in other ways."""
    from benchmarks.claims.runs import test_evaluation, trained_at

    top1 = test_evaluation(recipe)["top1"]
    point = describe(recipe)
    for row in rows:
        if all(row[key] == point[key] for key in RUN):
            row |= {"top1": top1, "trained_at": trained_at(recipe)}


def mark_front(rows: list[Row], tolerance: float) -> None:
    """Mark the rows that no other beats in both training time and accuracy, and the recommended one.

    Recommended is the cheapest whose top-1 is at most `tolerance` points below the best.
    """
    known = [row for row in rows if "top1" in row and "train_minutes" in row]
    for row in known:
        row["pareto"] = not any(
            other["train_minutes"] <= row["train_minutes"]
            and other["top1"] >= row["top1"]
            and (other["train_minutes"], other["top1"]) != (row["train_minutes"], row["top1"])
            for other in known
        )
        row["recommended"] = False
    if known:
        best = max(row["top1"] for row in known)
        good = [row for row in known if 100 * row["top1"] >= 100 * best - tolerance]
        min(good, key=lambda row: row["train_minutes"])["recommended"] = True
