"""The paper's claims as questions, on data that a small machine can train on, with several seeds and the controls.

A small ViT is pretrained on one cast of drawn characters, then fine-tuned by SGD at a fixed rate on another cast
(`drawn`) and on photos (`photos`), with batch sizes from 16 to 256 and both heads. Every run is a recipe of this
project, trained by its loop; `benchmarks/claims/questions.py` says what the runs answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.claims.questions import answer_questions
from benchmarks.claims.runs import finish_runs, last_train_loss, read_summary, test_evaluation, trained_at
from benchmarks.result import read_rows, write_result
from dist_train.config import DataConfig, ModelConfig, OptimConfig, Recipe, TrainConfig
from dist_train.data.manifest import MANIFEST_NAME, read_manifest
from dist_train.errors import UseError
from dist_train.output import say
from dist_train.train.schedule import count_steps

T = TypeVar("T")

DRAWN, PHOTOS = "drawn", "photos"
PRETRAINING_CAST, FINE_TUNING_CAST = 1, 2  # seeds of shards.demo: two casts without a common character
BACKBONE, FINER = "vit_tiny_patch32", "vit_tiny_patch16"
IMAGE_SIZE, SMALLER = 64, 32
MARGIN = 8
HEADS = ("cls", "ifa")
EXPERIMENTS = ("batch", "scaling", "init", "steps", "patch", "text")


@dataclass(frozen=True)
class Study:
    """How large a study is.

    photos: a CSV that `shards build` takes, with its class column; None leaves the photos out. vocabulary: WordPiece
    file for the tags; None leaves text out. rates, epochs: learning rate and epochs of fine-tuning on each data set.
    seeds: how many.
    """

    scratch: Path
    photos: Path | None
    class_column: str
    vocabulary: Path | None
    rates: dict[str, float]
    epochs: dict[str, int]
    experiments: tuple[str, ...] = EXPERIMENTS
    seeds: int = 3
    batches: tuple[int, ...] = (16, 32, 64, 128, 256)
    characters: int = 40
    pictures: int = 3200
    pretraining_characters: int = 200
    pretraining_pictures: int = 20000
    pretraining_epochs: int = 3


@dataclass(frozen=True)
class Run:
    """One training run. budget: what is the same as in the other runs that it is compared with."""

    experiment: str
    data: str
    head: str
    batch_size: int
    seed: int
    backbone: str = BACKBONE
    head_init: str = "reference"
    image_size: int = IMAGE_SIZE
    text_tokens: int = 0
    lr_scaling: str = "none"
    budget: str = "epochs"

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.experiment, self.data, self.backbone, f"{self.image_size}px", self.head, self.head_init]
        parts += [f"text{self.text_tokens}", f"batch{self.batch_size}", self.lr_scaling, self.budget]
        return "-".join([*parts, f"seed{self.seed}"])


def run_study(study: Study, jobs: int, name: str) -> Path:
    """Make the data, pretrain, train every run that is not finished, and write the result after each.

    jobs: runs at a time. Returns the path of the result.
    """
    runs = plan(study)
    say(f"{len(runs)} runs in {study.scratch}, {jobs} at a time")
    make_data(study)
    pretrain(study, sorted({run.backbone for run in runs}), jobs)
    by_folder = {recipe_of(run, study).train.run: run for run in runs}
    rows: list[dict[str, Any]] = []
    path = None
    for recipe in finish_runs([recipe_of(run, study) for run in runs], jobs, "study"):
        rows.append(row_of(by_folder[recipe.train.run], recipe, study))
        path = write_study(study, rows, runs, name)
    if path is None:
        raise UseError("no run in this study: name at least one experiment, batch size and seed")
    return path


def write_study(study: Study, rows: list[dict[str, Any]], runs: list[Run], name: str) -> Path:
    """The result so far: rows in the order of the plan, and what they answer."""
    order = {run.name: i for i, run in enumerate(runs)}
    rows = sorted(rows, key=lambda row: order[row["run"]])
    parameters = json.loads(json.dumps(asdict(study), default=str)) | {
        "planned_runs": len(runs),
        "finished_runs": len(rows),
        "optimizer": "sgd, momentum 0.9, cosine after a warm-up of a twentieth of the steps",
        "precision": "float32",
    }
    surfaces = [
        row | {"seed": runs[order[row["run"]]].seed} for row in read_rows("landscape", name) if row["run"] in order
    ]
    return write_result("study", name, parameters, rows, {"answers": answer_questions(rows, surfaces)})


def plan(study: Study) -> list[Run]:
    """Every run, the most important first."""
    seeds = range(study.seeds)
    smallest, middle, largest = study.batches[0], study.batches[len(study.batches) // 2], study.batches[-1]
    data = [DRAWN] + ([PHOTOS] if study.photos else [])

    def of(experiment: str) -> Iterator[Run]:
        for seed in seeds:
            for head in HEADS:
                drawn = Run(experiment, DRAWN, head, largest, seed)
                if experiment == "batch":
                    yield from (replace(drawn, data=which, batch_size=b) for which in data for b in study.batches)
                elif experiment == "scaling":
                    yield from (replace(drawn, lr_scaling=rule) for rule in ("linear", "sqrt"))
                elif experiment == "init":
                    # Beside `batch`, where CLS starts at zero and IFA at PyTorch's default, as in the reference.
                    others = ("default",) if head == "cls" else ("zero", "mean")
                    yield from (replace(drawn, head_init=o, batch_size=b) for o in others for b in (smallest, largest))
                elif experiment == "steps":
                    # As many steps as the middle batch size has in the fixed number of epochs.
                    yield from (replace(drawn, budget="steps", batch_size=b) for b in (smallest, largest))
                elif experiment == "patch" and head == "cls":
                    finer = replace(drawn, batch_size=middle, backbone=FINER)
                    yield from (finer, replace(finer, image_size=SMALLER))
                elif experiment == "text" and head == "cls" and study.vocabulary:
                    yield from (replace(drawn, batch_size=middle, text_tokens=tokens) for tokens in (16, 32, 64))

    if unknown := set(study.experiments) - set(EXPERIMENTS):
        raise UseError(f"--experiments: no experiment '{min(unknown)}'; there are {', '.join(EXPERIMENTS)}")
    return [run for experiment in EXPERIMENTS if experiment in study.experiments for run in of(experiment)]


def make_data(study: Study) -> None:
    """The shard sets, unless they are there."""
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
    out = study.scratch / "data" / PHOTOS
    if study.photos and not (out / MANIFEST_NAME).exists():
        source = read_source(study.photos, class_column=study.class_column)
        build_shard_set(source, out, BuildOptions(size=side, workers=2))


def pretrain(study: Study, backbones: list[str], jobs: int) -> None:
    """Train ViTs on the pretraining cast and export their weights, unless that is done."""
    from dist_train.cli import main

    recipes = [pretraining_recipe(study, backbone) for backbone in backbones]
    for recipe in finish_runs(recipes, jobs, "pretraining"):
        weights = weights_file(study, recipe.model.backbone)
        if not weights.exists():
            main(["export", recipe.train.run, str(weights), "--checkpoint", "last"])


def pretraining_recipe(study: Study, backbone: str) -> Recipe:
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


def weights_file(study: Study, backbone: str) -> Path:
    """The pretrained weights."""
    return study.scratch / f"pretraining-{backbone}.safetensors"


def recipe_of(run: Run, study: Study) -> Recipe:
    """The recipe of a run."""
    samples = read_manifest(str(study.scratch / "data" / run.data)).split("train").samples
    epochs = study.epochs[run.data]
    if run.budget == "steps":
        middle = study.batches[len(study.batches) // 2]
        if epochs * run.batch_size % middle:
            raise UseError(f"--epochs: {epochs} at batch {middle} are no whole epochs at batch {run.batch_size}")
        epochs = epochs * run.batch_size // middle
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
            lr_reference_batch=study.batches[0],
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


def data_config(study: Study, folder: str, image_size: int) -> DataConfig:
    """Few samples are seen: the crop shifts by an eighth of the image, not by the paper's fifth."""
    margin = MARGIN * image_size // IMAGE_SIZE
    return DataConfig(shards=str(study.scratch / "data" / folder), image_size=image_size, crop_margin=margin)


def row_of(run: Run, recipe: Recipe, study: Study) -> dict[str, Any]:
    """A finished run."""
    summary, test = read_summary(recipe), test_evaluation(recipe)
    return {
        "run": run.name,
        **asdict(run),
        "pretraining_top1": test_evaluation(pretraining_recipe(study, run.backbone))["top1"],
        "lr": recipe.optim.lr,
        "epochs": recipe.train.epochs,
        "steps": summary["steps"],
        "images_seen": summary["samples"],
        "top1": test["top1"],
        "test_loss": test["loss"],
        "test_samples": test["samples"],
        "train_loss": last_train_loss(recipe),
        "seconds": summary["seconds"],
        "trained_at": trained_at(recipe),
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
