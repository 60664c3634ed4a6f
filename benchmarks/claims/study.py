"""The paper's claims as questions, on data that a small machine can train on, with several seeds and the controls.

A small ViT is pretrained on one cast of drawn characters, then fine-tuned by SGD at a fixed rate on another cast
(`drawn`) and on photos (`photos`), with batch sizes from 16 to 256 and both heads. Every run is a recipe of this
project, trained by its loop; `benchmarks/claims/questions.py` says what the runs answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, TypeVar

from benchmarks.arguments import check_words, numbers
from benchmarks.benchmark import Benchmark
from benchmarks.claims import require
from benchmarks.claims.questions import answer_questions
from benchmarks.claims.runs import SUMMARY_NAME, finish_runs, outcome, read_summary, test_evaluation
from benchmarks.claims.study_figures import study_charts, summary_table
from benchmarks.claims.study_runs import DRAWN, HEADS, PHOTOS, Run
from benchmarks.result import read_rows, write_result
from benchmarks.tables import FOLDED, Document, Row, Table, by, table_of
from dist_train.config import DataConfig, HeadInit, LrScaling, ModelConfig, OptimConfig, Recipe, TrainConfig
from dist_train.data.manifest import MANIFEST_NAME, read_manifest
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1
from dist_train.train.schedule import count_steps

T = TypeVar("T", int, float)

PRETRAINING_CAST, FINE_TUNING_CAST = 1, 2  # seeds of shards.demo: two casts without a common character
IMAGE_SIZE, MARGIN = 64, 8  # pixels
FINER, SMALLER = "vit_tiny_patch16", 32
EXPERIMENTS = ("batch", "scaling", "init", "steps", "patch", "text")


@dataclass(frozen=True)
class Arguments:
    """Pretrain a small ViT on one cast of drawn characters, fine-tune it on another and on photos with several batch
    sizes, heads and seeds, and say what the runs answer. Where it was stopped, the same command continues it."""

    name: str
    """of the result: benchmarks/results/study/NAME.json"""
    scratch: Path = Path("runs/study")
    """folder for the data and the runs"""
    photos: Path | None = None
    """photos to fine-tune on: a CSV, as `shards build` takes it; without it no photos"""
    class_column: str = "class"
    """of the CSV"""
    vocabulary: Path | None = None
    """WordPiece vocab.txt for the tags; without it no text"""
    lr: str = "0.01"
    """learning rate of fine-tuning, or drawn=RATE,photos=RATE"""
    experiments: str = ",".join(EXPERIMENTS)
    """only these, separated by commas"""
    seeds: Annotated[int, AT_LEAST_1] = 3
    """of each run"""
    batches: str = "16,32,64,128,256"
    """batch sizes, separated by commas"""
    epochs: str = "drawn=4,photos=2"
    """of fine-tuning, or one number for both"""
    pictures: int = 3200
    """of the cast to fine-tune on"""
    characters: int = 40
    """of that cast"""
    pretraining_pictures: int = 20000
    """of the cast to pretrain on"""
    pretraining_characters: int = 200
    """of that cast"""
    pretraining_epochs: int = 3
    """on those pictures"""
    jobs: int = 1
    """runs at a time, a GPU each if there are any"""

    def __post_init__(self) -> None:
        """Raise UseError for values that cannot be, before anything is trained."""
        check_words("--experiments", "experiment", self.chosen, EXPERIMENTS)
        _ = self.rates, self.batch_sizes
        if min(self.epochs_on.values()) < 1:
            raise UseError(f"--epochs: {min(self.epochs_on.values())} is not at least 1")

    @property
    def rates(self) -> dict[str, float]:
        """Learning rate on each data set."""
        return per_data("--lr", self.lr, float)

    @property
    def epochs_on(self) -> dict[str, int]:
        """Epochs of fine-tuning on each data set."""
        return per_data("--epochs", self.epochs, int)

    @property
    def batch_sizes(self) -> list[int]:
        """Ascending."""
        return sorted(numbers("--batches", self.batches))

    @property
    def middle(self) -> int:
        """The batch size in the middle."""
        return self.batch_sizes[len(self.batch_sizes) // 2]

    @property
    def chosen(self) -> list[str]:
        """The experiments."""
        return self.experiments.split(",")


def run(arguments: Arguments) -> Path:
    """Make the data, pretrain, train every run that is not finished, and write the result after each."""
    require("scipy", "scipy")
    runs = plan(arguments)
    if not runs:
        raise UseError("no run in this study: name at least one experiment that has what it needs")
    say(f"{len(runs)} runs in {arguments.scratch}, {arguments.jobs} at a time")
    make_data(arguments)
    pretrain(arguments, sorted({run.backbone for run in runs}))
    recipes = [recipe_of(run, arguments) for run in runs]
    by_folder = {recipe.train.run: run for run, recipe in zip(runs, recipes, strict=True)}
    rows: list[Row] = []
    for recipe in finish_runs(recipes, arguments.jobs, "study"):
        rows.append(row_of(by_folder[recipe.train.run], recipe, arguments))
        write_study(arguments, rows, runs)
    return write_study(arguments, rows, runs)


def write_study(study: Arguments, rows: list[Row], runs: list[Run]) -> Path:
    """The result so far: rows in the order of the plan, and what they answer."""
    order = {run.name: i for i, run in enumerate(runs)}
    rows = sorted(rows, key=lambda row: order[row["run"]])
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(study).items()}
    for key in ("name", "lr", "jobs"):
        del asked[key]
    asked |= {"rates": study.rates, "epochs": study.epochs_on}
    asked |= {"experiments": study.chosen, "batches": study.batch_sizes}
    asked |= {
        "planned_runs": len(runs),
        "finished_runs": len(rows),
        "optimizer": "sgd, momentum 0.9, cosine after a warm-up of a twentieth of the steps",
        "precision": "float32",
    }
    surfaces = [
        row | asdict(runs[order[row["run"]]]) for row in read_rows("landscape", study.name) if row["run"] in order
    ]
    return write_result("study", study.name, asked, rows, {"answers": answer_questions(rows, surfaces)})


def plan(study: Arguments) -> list[Run]:
    """Every run, the most important first."""
    smallest, largest = study.batch_sizes[0], study.batch_sizes[-1]
    data = [DRAWN, PHOTOS] if study.photos else [DRAWN]
    scalings: list[LrScaling] = ["linear", "sqrt"]
    runs = []
    for experiment, seed, head in product([e for e in EXPERIMENTS if e in study.chosen], range(study.seeds), HEADS):
        drawn = Run(experiment, DRAWN, head, largest, seed)
        extremes = [replace(drawn, batch_size=batch) for batch in (smallest, largest)]
        middle = replace(drawn, batch_size=study.middle)
        if experiment == "batch":
            runs += [replace(drawn, data=which, batch_size=batch) for which in data for batch in study.batch_sizes]
        elif experiment == "scaling":
            runs += [replace(drawn, lr_scaling=rule) for rule in scalings]
        elif experiment == "init":
            # Beside `batch`, where CLS starts at zero and IFA at PyTorch's default, as in the reference.
            others: list[HeadInit] = ["default"] if head == "cls" else ["zero", "mean"]
            runs += [replace(run, head_init=other) for other in others for run in extremes]
        elif experiment == "steps":
            # As many steps as the middle batch size has in the fixed number of epochs.
            runs += [replace(run, budget="steps") for run in extremes]
        elif experiment == "patch" and head == "cls":
            finer = replace(middle, backbone=FINER)
            runs += [finer, replace(finer, image_size=SMALLER)]
        elif experiment == "text" and head == "cls" and study.vocabulary:
            runs += [replace(middle, text_tokens=tokens) for tokens in (16, 32, 64)]
    return runs


def make_data(study: Arguments) -> None:
    """The shard sets, unless they are there. Raises UseError where one of drawn characters is not what is asked for."""
    from shards.build import build_shard_set
    from shards.demo.records import demo_records
    from shards.plan import BuildOptions
    from shards.sources import read_source

    side = IMAGE_SIZE + MARGIN
    for folder, characters, pictures, cast, ratios in (
        ("pretraining", study.pretraining_characters, study.pretraining_pictures, PRETRAINING_CAST, (0.94, 0.03, 0.03)),
        (DRAWN, study.characters, study.pictures, FINE_TUNING_CAST, (0.5, 0.05, 0.45)),
    ):
        out = study.scratch / "data" / folder
        if not (out / MANIFEST_NAME).exists():
            records = demo_records(characters, pictures, side, cast)
            build_shard_set(records, out, BuildOptions(size=side, seed=cast, ratios=ratios, workers=2))
        manifest = read_manifest(out)
        there = sum(split.samples for split in manifest.splits.values()), len(manifest.classes)
        if there != (pictures, characters):
            raise UseError(
                f"{out}: has {there[0]:,} pictures of {there[1]} characters, not {pictures:,} of {characters}; remove "
                f"{study.scratch}, or give another --scratch"
            )
    out = study.scratch / "data" / PHOTOS
    if study.photos and not (out / MANIFEST_NAME).exists():
        source = read_source(study.photos, class_column=study.class_column)
        build_shard_set(source, out, BuildOptions(size=side, workers=2))


def pretrain(study: Arguments, backbones: list[str]) -> None:
    """Train ViTs on the pretraining cast and export their weights, unless that is done.

    Raises UseError where weights are of an earlier pretraining, as the runs that began from them are then too.
    """
    from dist_train.cli import main

    recipes = [pretraining_recipe(study, backbone) for backbone in backbones]
    for recipe in finish_runs(recipes, study.jobs, "pretraining"):
        weights, ended = weights_file(study, recipe.model.backbone), Path(recipe.train.run) / SUMMARY_NAME
        if weights.exists() and weights.stat().st_mtime < ended.stat().st_mtime:
            raise UseError(
                f"{weights}: is older than its pretraining; if that was trained again, remove it and "
                f"{study.scratch / 'runs'}, which began from it; if both were only copied, touch it"
            )
        if not weights.exists() and main(["export", recipe.train.run, str(weights), "--checkpoint", "last"]):
            raise WorkError(f"{recipe.train.run}: its weights could not be exported")


def pretraining_recipe(study: Arguments, backbone: str) -> Recipe:
    """The recipe of a pretraining: AdamW, the CLS head."""
    data = data_config(study, "pretraining", IMAGE_SIZE)
    steps = count_steps(study.pretraining_epochs, read_manifest(data.shards).split("train").samples, 64)
    return Recipe(
        data=data,
        model=ModelConfig(backbone=backbone, head="cls"),
        optim=OptimConfig(
            name="adamw", lr=0.0005, weight_decay=0.05, decay_all=True, warmup_steps=steps // 10, clip_norm=1.0
        ),
        train=TrainConfig(
            run=str(weights_file(study, backbone).with_suffix("")),
            epochs=study.pretraining_epochs,
            eval_every=1000,
            batch_size=64,
        ),
    )


def weights_file(study: Arguments, backbone: str) -> Path:
    """The pretrained weights."""
    return study.scratch / f"pretraining-{backbone}.safetensors"


def recipe_of(run: Run, study: Arguments) -> Recipe:
    """The recipe of a run."""
    samples = read_manifest(str(study.scratch / "data" / run.data)).split("train").samples
    epochs = study.epochs_on[run.data]
    if run.budget == "steps":
        if epochs * run.batch_size % study.middle:
            raise UseError(f"--epochs: {epochs} at batch {study.middle} are no whole epochs at batch {run.batch_size}")
        epochs = epochs * run.batch_size // study.middle
    steps = count_steps(epochs, samples, run.batch_size)
    data = data_config(study, run.data, run.image_size)
    if run.text_tokens:
        data = replace(data, tokenizer=str(study.vocabulary))
    return Recipe(
        data=data,
        model=ModelConfig(
            backbone=run.backbone,
            head=run.head,
            head_init=run.head_init,
            text_tokens=run.text_tokens,
            weights=str(weights_file(study, run.backbone)),
        ),
        optim=OptimConfig(
            lr=study.rates[run.data],
            schedule="cosine",
            warmup_steps=steps // 20,
            lr_scaling=run.lr_scaling,
            lr_reference_batch=study.batch_sizes[0],
        ),
        train=TrainConfig(
            run=str(study.scratch / "runs" / run.name),
            seed=run.seed,
            epochs=epochs,
            batch_size=run.batch_size,
            eval_batch_size=128,
            eval_every=1000,
            log_every=max(1, steps // 8),
            keep_checkpoints=1,
        ),
    )


def data_config(study: Arguments, folder: str, image_size: int) -> DataConfig:
    """Few samples are seen: the crop shifts by an eighth of the image, not by the paper's fifth."""
    margin = MARGIN * image_size // IMAGE_SIZE
    return DataConfig(shards=str(study.scratch / "data" / folder), image_size=image_size, crop_margin=margin)


def row_of(run: Run, recipe: Recipe, study: Arguments) -> Row:
    """A finished run."""
    summary = read_summary(recipe)
    return {
        "run": run.name,
        **asdict(run),
        "pretraining_top1": test_evaluation(pretraining_recipe(study, run.backbone))["top1"],
        "lr": recipe.optim.lr,
        "epochs": recipe.train.epochs,
        "steps": summary["steps"],
        "images_seen": summary["samples"],
        "test_samples": test_evaluation(recipe)["samples"],
        "seconds": summary["seconds"],
        **outcome(recipe),
    }


def per_data(option: str, text: str, kind: Callable[[str], T]) -> dict[str, T]:
    """`4` for all data, or `drawn=4,photos=2`."""
    try:
        if "=" not in text:
            return dict.fromkeys((DRAWN, PHOTOS), kind(text))
        values = {name: kind(value) for name, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise UseError(f"{option}: a number, or drawn=NUMBER,photos=NUMBER is expected, not '{text}'") from None
    if set(values) != {DRAWN, PHOTOS}:
        raise UseError(f"{option}: a number each for drawn and photos is expected, not '{text}'")
    return values


# ---------------------------------------------------------------------- what the report shows
def headline(document: Document) -> str:
    """How many questions got each verdict."""
    verdicts = {word: len(its) for word, its in by(document.get("answers") or [], "verdict").items() if word}
    said = ", ".join(f"{count} {word}" for word, count in verdicts.items())
    return f"Of {sum(verdicts.values())} questions {said}; {len(document['rows'])} training runs" if said else ""


def tables(document: Document) -> list[Table]:
    """A summary of the configurations, then all runs."""
    rows = document["rows"]
    all_rows = table_of(f"All {len(rows)} rows", COLUMNS, rows, folded=len(rows) >= FOLDED)
    return [summary_table(rows), all_rows] if rows else [all_rows]


COLUMNS = [
    ("experiment", "experiment", ""),
    ("data", "data", ""),
    ("backbone", "backbone", ""),
    ("head", "head", ""),
    ("head_init", "head starts", ""),
    ("image_size", "px", "d"),
    ("text_tokens", "text tokens", "d"),
    ("batch_size", "batch", ",d"),
    ("lr_scaling", "rate scaling", ""),
    ("budget", "equal", ""),
    ("lr", "rate", "g"),
    ("epochs", "epochs", "g"),
    ("steps", "steps", ",d"),
    ("images_seen", "images seen", ",d"),
    ("seed", "seed", "d"),
    ("top1", "test top-1", ".2%"),
    ("test_loss", "test loss", ".4f"),
    ("test_samples", "test samples", ",d"),
    ("train_loss", "train loss", ".4f"),
    ("seconds", "seconds", ",.0f"),
    ("trained_at", "trained at", ""),
]
BENCHMARK = Benchmark(
    "study",
    "The paper's claims as questions, with seeds and controls",
    Arguments,
    run,
    COLUMNS,
    headline,
    study_charts,
    tables,
    pictured=True,
)
