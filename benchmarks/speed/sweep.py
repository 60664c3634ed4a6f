"""The sweep of the benchmark `batch_size`: its points, what is measured of each, and which of them are trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any, Literal, cast, get_args

from benchmarks.arguments import check_words, numbers, words
from benchmarks.points import gpu_environment
from benchmarks.result import finished_rows, write_result
from benchmarks.speed import step
from benchmarks.speed.fit import largest_micro_batch
from benchmarks.speed.knee import predicted_knee
from benchmarks.speed.recommend import mark
from benchmarks.tables import Row, describe_row
from dist_train.config import Compile, Head, Recipe
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1, NOT_NEGATIVE

START_S, COMPILE_S = 12.0, 30.0  # of a measuring process, roughly; only the printed plan uses it
RUN = ("backbone", "head", "image_size", "batch_size")  # what tells one training from another
UTILISATION = 0.5  # of the matrix-product rate, likewise
COMPILE = ("none", "kernels", "graphs")  # values of model.compile that a sweep can compare
CHANGES_NO_MEASUREMENT = ("name", "jobs", "accuracy", "seeds", "tolerance")
"""Arguments with which a result is gone on with, not begun anew."""


@dataclass(frozen=True)
class Arguments:
    """Step time, memory, time and money per epoch over batch sizes, models, heads and image sizes, with --accuracy also
    training to the end. Every point shares the recipe. If it is stopped, the same command continues."""

    name: str
    """of the result: benchmarks/results/batch_size/NAME.json"""
    backbones: str | None = None
    """names separated by commas (the recipe's by default)"""
    heads: str = "cls,ifa"
    """of cls,ifa,mean,last_n,all_layers,attentive"""
    batches: str = "16,32,64,128,256"
    """global batch sizes"""
    sizes: str | None = None
    """sides of the images, pixels (the recipe's by default)"""
    arm: Literal["synthetic", "end_to_end"] | None = None
    """of the benchmark step; by default end_to_end, which loads what it trains on, with --accuracy, else synthetic"""
    compile: str | None = None
    """values of model.compile; by default none,graphs on a GPU, which shows what of a step is the host's, else none"""
    micro_batch: Annotated[int, NOT_NEGATIVE] = 0
    """measure each batch accumulated from this many, too (by default the recipe's train.micro_batch_size)"""
    search: Annotated[int, NOT_NEGATIVE] = 0
    """find the largest micro-batch that fits, up to this many"""
    memory_gb: Annotated[float, NOT_NEGATIVE] = 0.0
    """that a process may take"""
    price_per_hour: Annotated[float | None, NOT_NEGATIVE] = None
    """of the device, in any currency"""
    accuracy: bool = False
    """train to the end at each batch size, and end with a page that says which to take"""
    seeds: Annotated[int, AT_LEAST_1] = 1
    """trainings of each batch size with --accuracy, from the recipe's seed on; more can be added later"""
    tolerance: Annotated[float, NOT_NEGATIVE] = 1.0
    """points of top-1 that the recommended, cheapest batch may be below the best"""
    warmup: Annotated[int, NOT_NEGATIVE] = 2
    """steps before those that are measured"""
    steps: Annotated[int, AT_LEAST_1] = 10
    """steps measured"""
    jobs: Annotated[int, AT_LEAST_1] = 1
    """runs at a time, a GPU each if there are any"""


def measure_batch_sizes(base: Recipe, sweep: Arguments) -> Path:
    """Measure every point that is not yet in the result, train if asked to, and return the path of the result."""
    samples, jobs, name = samples_per_epoch(base), sweep.jobs, sweep.name
    recipes = list(points(base, sweep))
    if sweep.accuracy:
        check_training(base, recipes)
    measures = {key: value for key, value in asdict(sweep).items() if key not in CHANGES_NO_MEASUREMENT}
    measures["arm"] = arm_of(sweep)
    parameters = {"recipe": asdict(base), "sweep": measures, "samples_per_epoch": samples}
    there = {key_of(row): row for row in finished_rows("batch_size", name, parameters)}
    left = [recipe for recipe in recipes if key_of(describe(recipe)) not in there]
    say(describe_plan(left, len(recipes), sweep, samples))
    rows = list(there.values())

    def write() -> Path:
        mark(rows, sweep.tolerance, sweep.steps)
        return write_result("batch_size", name, parameters, rows, {"tolerance": sweep.tolerance})

    path = write()

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
            path = write()
            say(describe_row(row, f"{row['backbone']} {row['head']} batch {row['batch_size']}"))
    for _ in search_micro_batches(rows, recipes, sweep) if sweep.search else ():
        path = write()
    if sweep.accuracy:
        from benchmarks.claims.runs import finish_runs

        finished: dict[tuple[Any, ...], list[Recipe]] = {}
        for recipe in finish_runs(with_seeds(recipes_to_train(recipes, rows), sweep.seeds), jobs, "accuracy"):
            its = finished.setdefault(run_of(describe(recipe)), [])
            its.append(recipe)
            add_accuracy(rows, its)
            path = write()
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


def points(base: Recipe, sweep: Arguments) -> Iterator[Recipe]:
    """The recipe of every point. Raises UseError for words that name none."""
    folder = Path(base.train.run)
    heads, compiled = words(sweep.heads), words(sweep.compile or default_compile())
    accumulated = sweep.micro_batch or base.train.micro_batch_size
    if accumulated == "auto":
        raise UseError("train.micro_batch_size auto: which is fastest is what is measured; give --micro-batch a number")
    check_words("--heads", "head", heads, get_args(Head))
    check_words("--compile", "", compiled, COMPILE)
    for backbone in words(sweep.backbones or base.model.backbone):
        for head in cast(list[Head], heads):
            for size in numbers("--sizes", sweep.sizes or str(base.data.image_size)):
                for batch in numbers("--batches", sweep.batches):
                    run = folder / f"{backbone}-{head}-{size}px-batch{batch}"
                    micros = (0, accumulated) if 0 < accumulated < batch else (0,)
                    for micro, compile in product(micros, cast(list[Compile], compiled)):
                        if micro and batch % micro:
                            what = "--micro-batch" if sweep.micro_batch else "train.micro_batch_size"
                            raise UseError(f"{what} {micro} does not divide the batch size {batch}")
                        yield replace(
                            base,
                            data=replace(base.data, image_size=size),
                            model=replace(base.model, backbone=backbone, head=head, compile=compile),
                            train=replace(base.train, batch_size=batch, micro_batch_size=micro, run=str(run)),
                        )


def default_compile() -> str:
    """The values of model.compile that are measured where none are named."""
    import torch

    return "none,graphs" if torch.cuda.is_available() else "none"


def arm_of(sweep: Arguments) -> str:
    """Which arm of the benchmark `step` is measured."""
    return sweep.arm or ("end_to_end" if sweep.accuracy else "synthetic")


def with_seeds(recipes: Sequence[Recipe], seeds: int) -> list[Recipe]:
    """Each recipe with each of so many seeds, those of one seed together: stopped, all batches have as many. The
    folder of the first seed's run has the name that it has where there is no other."""
    return [
        replace(
            recipe,
            train=replace(
                recipe.train, seed=recipe.train.seed + more, run=recipe.train.run + (f"-seed{more}" if more else "")
            ),
        )
        for more in range(seeds)
        for recipe in recipes
    ]


def describe(recipe: Recipe) -> Row:
    """What tells one point from another."""
    row = step.describe(recipe, arm="")
    row["accumulation"] = row["batch_size"] // row["micro_batch"]
    return {key: row[key] for key in (*RUN, "micro_batch", "accumulation", "compile", "precision")}


def key_of(row: Row) -> tuple[Any, ...]:
    """The point that a row is of."""
    return tuple(row[key] for key in (*RUN, "micro_batch", "compile"))


def run_of(row: Row) -> tuple[Any, ...]:
    """The training, whatever its seed, that a row is of."""
    return tuple(row[key] for key in RUN)


def measure_point(recipe: Recipe, sweep: Arguments, samples: int, environment: dict[str, str]) -> Row:
    """One row: cost of a step and of an epoch."""
    row = describe(recipe)
    limit = int(sweep.memory_gb * 1e9)
    arm = arm_of(sweep)
    measured = step.measure(recipe, arm, sweep.warmup, sweep.steps, environment, limit)
    if measured.get("out_of_memory") is True:
        row["out_of_memory"] = True
    else:
        minutes = samples / measured["images_per_s"] / 60
        row |= {key: measured[key] for key in ("step_ms", "step_ms_p95", "images_per_s")}
        row |= {"peak_mb": measured["memory_mb"], "saved_activations_mb": measured.get("saved_activations_mb")}
        row |= {"mfu_of_matmul": measured.get("mfu_of_matmul"), "epoch_minutes": round(minutes, 3)}
        row["train_minutes"] = round(minutes * recipe.train.epochs, 3)
        # The device's own account beside the allocator's, and why there is no energy, where there is none.
        also = ("device_mb", "joules_per_image", "no_energy", *(("data_wait_share",) if arm == "end_to_end" else ()))
        row |= {key: measured[key] for key in also if measured.get(key) is not None}
        if "joules_per_image" in row:
            row["train_wh"] = round(row["joules_per_image"] * samples * recipe.train.epochs / 3600, 4)
        for what in ("epoch", "train") if sweep.price_per_hour is not None else ():
            row[f"{what}_price"] = round(row[f"{what}_minutes"] / 60 * (sweep.price_per_hour or 0), 4)
    return row


def search_micro_batches(rows: list[Row], recipes: list[Recipe], sweep: Arguments) -> Iterator[None]:
    """Find each model's largest micro-batch, which is the same at every batch size, and put it into its rows."""
    model_of = itemgetter("backbone", "head", "image_size")
    for recipe in {model_of(describe(recipe)): recipe for recipe in recipes}.values():
        mine = [row for row in rows if model_of(row) == model_of(describe(recipe))]
        if any("largest_micro_batch" not in row for row in mine):
            largest = largest_micro_batch(recipe, sweep.search, int(sweep.memory_gb * 1e9))
            for row in mine:
                row["largest_micro_batch"] = largest
            yield


def samples_per_epoch(recipe: Recipe) -> int:
    """Samples of the train split of the recipe's shard set, or the paper's where the set is not there, and says so."""
    try:
        return read_manifest(recipe.data.shards).split("train").samples
    except UseError as error:
        say(f"{error}. An epoch is taken to have the {step.PAPER_SAMPLES:,} samples of the paper's.")
        return step.PAPER_SAMPLES


def describe_plan(left: list[Recipe], total: int, sweep: Arguments, samples: int) -> str:
    """What will be measured and trained, and roughly how long it takes."""
    import torch

    from dist_train.models.build import build_model
    from dist_train.train.inputs import one_sample
    from dist_train.train.meters import matmul_rate, training_flops_per_sample
    from dist_train.train.precision import compute_dtype

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = training = 0.0
    rates: dict[tuple[str, int], float] = {}
    trained = set()  # in one of the ways that make a batch: they change nothing in what is learnt
    for recipe in left:
        model = (recipe.model.backbone, recipe.data.image_size)
        if model not in rates:
            config = replace(recipe.model, weights="none", checkpoint_blocks=False)
            vocabulary = step.SYNTHETIC_VOCABULARY if config.text_tokens else 0
            network = build_model(config, recipe.data.image_size, step.PAPER_CLASSES, vocabulary)[0]
            flops = training_flops_per_sample(network, *one_sample(recipe))
            rates[model] = UTILISATION * matmul_rate(device, compute_dtype(recipe.deepspeed)) / flops
        seconds += START_S + (COMPILE_S if recipe.model.compile != "none" else 0.0)
        seconds += (sweep.warmup + sweep.steps) * recipe.train.batch_size / rates[model]
        if sweep.accuracy and run_of(describe(recipe)) not in trained:
            trained.add(run_of(describe(recipe)))
            training += sweep.seeds * recipe.train.epochs * samples / rates[model]
    searched = ", without the search for the largest micro-batch" if sweep.search else ""
    lines = [f"{len(left)} of {total} points to measure, about {seconds / 60 / sweep.jobs:.0f} minutes{searched}"]
    if training:
        hours = training / 3600 / sweep.jobs
        lines.append(f"training to the end at each batch size, about {hours:.1f} hours where nothing is done yet")
    return "\n".join(lines)


def recipes_to_train(recipes: list[Recipe], rows: list[Row]) -> list[Recipe]:
    """One recipe for each model, head, image size and batch: with the fastest of the micro-batches and values of
    model.compile that fit."""
    by_key = {key_of(row): row for row in rows}
    fastest: dict[tuple[Any, ...], Recipe] = {}
    for recipe in recipes:
        row = by_key[key_of(describe(recipe))]
        run = run_of(row)
        best = fastest.get(run)
        if "step_ms" in row and (best is None or row["step_ms"] < by_key[key_of(describe(best))]["step_ms"]):
            fastest[run] = recipe
    return list(fastest.values())


def add_accuracy(rows: list[Row], finished: Sequence[Recipe]) -> None:
    """Put what the finished runs of one batch came to, one for each seed, into its row, and into those of the same
    batch made in other ways: mean test top-1, its standard error from two seeds on, and the noise scale that they
    logged."""
    from benchmarks.claims.runs import test_evaluation, trained_at

    finished = sorted(finished, key=lambda recipe: recipe.train.seed)
    top1 = [test_evaluation(recipe)["top1"] for recipe in finished]
    figures: Row = {"top1": statistics.fmean(top1), "top1_by_seed": top1, "seeds": len(top1)}
    figures["top1_error"] = statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else None
    figures["trained_at"] = ", ".join(sorted({trained_at(recipe) for recipe in finished}))
    figures |= predicted_knee([Path(recipe.train.run) for recipe in finished])
    for row in rows:
        if run_of(row) == run_of(describe(finished[0])):
            row |= figures
