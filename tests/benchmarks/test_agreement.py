"""The plain loop that a fine-tuning recipe is compared with: its settings are those of the recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks.claims.agreement import Arguments, difference, run
from benchmarks.claims.plain_loop import build, cosine, parameter_groups, train_point
from benchmarks.result import write_result
from dist_train.config import Recipe
from dist_train.errors import UseError
from dist_train.models.build import build_model
from dist_train.parse import parse_recipe
from dist_train.train.engine import build_optimizer
from dist_train.train.schedule import learning_rate
from tests.harness import write_shard_set

BACKBONE = "test_vit"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("agreement")
    write_shard_set(folder / "set", {"train": [24], "test": [9]})
    weights = folder / "weights.safetensors"
    kept = timm.create_model(BACKBONE, num_classes=0).state_dict()
    save_file(kept, weights)
    options = {
        "data.shards": folder / "set",
        "data.image_size": 64,
        "data.crop": "random_resized",
        "data.eval_crop": "center",
        "model.backbone": BACKBONE,
        "model.weights": weights,
        "model.freeze": 2,
        "optim.name": "adamw",
        "optim.lr": 0.003,
        "optim.layer_decay": 0.75,
        "optim.weight_decay": 0.05,
        "optim.warmup_steps": 2,
        "train.batch_size": 8,
        "train.epochs": 2,
    }
    return parse_recipe([f"--{key}={value}" for key, value in options.items()])[0]


def test_each_parameter_learns_at_the_rate_and_decay_of_the_recipe(recipe: Recipe) -> None:
    model, _ = build_model(recipe.model, recipe.data.image_size, 3)
    ours = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimizer(recipe.optim, model).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("backbone.").replace("head.classifier.", "head.")
            ours[name] = (group["rate_scale"], group["weight_decay"])
    plain = build(asdict(recipe), 3)
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    theirs = {
        names[id(parameter)]: (group["scale"], group["weight_decay"])
        for group in parameter_groups(plain, asdict(recipe))
        for parameter in group["params"]
    }
    assert theirs.keys() == ours.keys()
    for name, settings in ours.items():
        assert theirs[name] == pytest.approx(settings), name


def test_both_start_from_the_same_function(recipe: Recipe) -> None:
    model, _ = build_model(recipe.model, recipe.data.image_size, 3)
    plain = build(asdict(recipe), 3).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        plain.forward_head(plain.forward_features(images), pre_logits=True), model.eval().backbone(images)
    )


def test_the_rate_is_the_recipes(recipe: Recipe) -> None:
    optim = recipe.optim
    for step in range(12):
        assert optim.lr * cosine(step, 12, 2) == pytest.approx(learning_rate(optim, 8, step, 12, 48))


def test_it_trains_and_evaluates_every_test_sample(recipe: Recipe) -> None:
    shards = Path(recipe.data.shards)
    splits = {split: sorted(map(str, shards.glob(f"{split}-*.tar"))) for split in ("train", "test")}
    found = train_point({"recipe": asdict(recipe), "splits": splits, "classes": 8})
    assert 9 * found["top1"] == pytest.approx(round(9 * found["top1"])) and found["train_loss"] > 0


@pytest.mark.slow
def test_both_arms_of_every_seed_are_trained_once_several_at_a_time(
    recipe: Recipe, results: Path, tmp_path: Path
) -> None:
    base = replace(recipe, train=replace(recipe.train, run=str(tmp_path / "runs")))
    document = json.loads(run(Arguments("tiny", seeds=1, jobs=2), base).read_bytes())
    assert {(row["arm"], row["seed"]) for row in document["rows"]} == {("ours", 0), ("plain", 0)}
    assert document["difference"] is None
    again = json.loads(run(Arguments("tiny", seeds=2, jobs=2), base).read_bytes())
    assert again["rows"][:2] == document["rows"] and len(again["rows"]) == 4
    assert again["difference"]["seeds"] == 2


def test_a_result_of_another_recipe_is_neither_continued_nor_overwritten(recipe: Recipe, results: Path) -> None:
    rows = [{"arm": "ours", "seed": 0, "top1": 0.5}]
    path = write_result("agreement", "tiny", {"recipe": asdict(recipe), "seeds": 1}, rows)
    before = path.read_bytes()
    other = replace(recipe, optim=replace(recipe.optim, lr=0.1))
    with pytest.raises(UseError, match="--name tiny: this result has runs of another recipe"):
        run(Arguments("tiny", seeds=1), other)
    with pytest.raises(UseError, match="--jobs: 0 is not at least 1"):
        run(Arguments("tiny", seeds=1, jobs=0), recipe)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("data", "mixup", 0.2),
        ("data", "crop", "squash"),
        ("model", "head", "ifa"),
        ("model", "freeze", "backbone"),
        ("model", "weights", "none"),
        ("optim", "name", "sgd"),
        ("optim", "clip_norm", 1.0),
        ("train", "ema", 0.99),
        ("deepspeed", "precision", "fp16"),
    ],
)
def test_a_recipe_that_the_plain_loop_would_train_otherwise_is_refused(
    recipe: Recipe, results: Path, section: str, key: str, value: object
) -> None:
    other = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    with pytest.raises(UseError, match=rf"^{section}\.{key} {value}: the plain loop does not know that"):
        run(Arguments("tiny", seeds=1), other)
    assert not results.exists()


def test_the_difference_has_the_error_of_both_arms() -> None:
    rows = [
        {"arm": arm, "seed": seed, "top1": top1}
        for arm, several in {"ours": (0.90, 0.92), "plain": (0.89, 0.93)}.items()
        for seed, top1 in enumerate(several)
    ]
    found = difference(rows)
    assert found is not None and found["points"] == pytest.approx(0)
    assert found["standard_error"] == pytest.approx((2 / 2 + 8 / 2) ** 0.5)
    assert difference(rows[:3]) is None
