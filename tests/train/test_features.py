"""The cache of a frozen backbone's features: the numbers of a run without it, whoever computes it and however often."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_train.cli import main, recipe_from_run
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.models.saved import list_checkpoints, read_step
from dist_train.train import features as features_module
from dist_train.use.trained import load_trained
from tests import harness
from tests.harness import (
    error_line,
    evaluations,
    flip,
    jpeg_bytes,
    logged_steps,
    newest_weights,
    read_summary,
    same,
    write_shard_set,
)
from tests.train.forked_ranks import train_on

COLOURS = ("brightness", "contrast", "saturation", "hue")
FROZEN: dict[str, object] = {
    "data__crop_margin": 0,
    "data__flip": "false",
    **{f"data__{key}": 0 for key in COLOURS},
    "data__shuffle_window": 16,
    "model__freeze": "backbone",
    "model__head_init": "default",
    "optim__name": "adamw",
    "optim__lr": 0.01,
    "train__eval_batch_size": 12,
}
arguments, train = (partial(function, **FROZEN) for function in (harness.arguments, harness.train))
TRAIN = [311, 40, 9]  # more than a chunk of 256


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": TRAIN, "val": [11, 2], "test": [10]}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits)  # not baked: images are resized


SHORT = {"train__batch_size": 60, "train__epochs": 1}


@pytest.fixture(scope="module")
def cache(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the features that an IFA head of the small ViT reads; a run has made it."""
    folder = tmp_path_factory.mktemp("features")
    assert train(shards, folder / "run", **SHORT, model__head="ifa", data__feature_cache=folder / "cache") == 0
    return folder / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that the backbone has seen while the store was filled, by batch."""
    counts: list[int] = []
    of_images = features_module._features

    def counting(model: Any, recipe: Any, images: torch.Tensor) -> torch.Tensor:
        counts.append(len(images))
        return of_images(model, recipe, images)

    monkeypatch.setattr(features_module, "_features", counting)
    return counts


def numbers(run: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Losses of the steps, and the evaluations."""
    return [entry["loss"] for entry in logged_steps(run)], evaluations(run)


def agree(one: Path, other: Path, rel: float = 1e-6) -> None:
    losses, evaluated = numbers(one)
    others, others_evaluated = numbers(other)
    assert len(losses) > 5 and losses == pytest.approx(others, rel=rel)
    for entry, expected in zip(evaluated, others_evaluated, strict=True):
        assert entry.pop("loss") == pytest.approx(expected.pop("loss"), rel=rel)
        assert entry == expected


# ---------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize(
    "options",
    [
        {"model__head": "ifa", "train__ema": 0.9, "train__micro_batch_size": 10},
        {"model__backbone": "resnet18", "data__image_size": 32, "train__channels_last": "true"},
        {"deepspeed__precision": "bf16", "model__head": "ifa"},
        {"deepspeed__precision": "bf16", "deepspeed__zero_stage": 2},
    ],
    ids=["ifa, averaged, in micro-batches", "resnet", "bf16", "bf16 zero 2"],
)
def test_losses_accuracies_and_weights_are_those_of_a_run_without_the_cache(
    shards: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    """In float32 to 1e-6: batches of another size may round otherwise. In bf16 such a rounding is larger."""
    options = {**SHORT, "train__batch_size": 40, **options}
    assert train(shards, tmp_path / "plain", **options) == 0
    assert train(shards, tmp_path / "cached", **options, data__feature_cache=tmp_path / "cache") == 0
    agree(tmp_path / "cached", tmp_path / "plain", 1e-6 if "deepspeed__precision" not in options else 1e-2)
    plain, cached = newest_weights(tmp_path / "plain"), newest_weights(tmp_path / "cached")
    assert plain.keys() == cached.keys()
    for name, tensor in plain.items():
        if name.startswith("backbone."):
            assert torch.equal(cached[name], tensor)
        elif "deepspeed__precision" not in options:
            torch.testing.assert_close(cached[name], tensor, rtol=1e-4, atol=1e-5)


def test_evaluate_predict_and_export_have_the_whole_model(
    shards: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photo = cache.parent / "run", tmp_path / "photo.jpg"
    assert main(["evaluate", str(run), "--split", "test", "--checkpoint", "last"]) == 0
    result, logged = json.loads(capsys.readouterr().out), read_summary(run)["evaluations"]["test"]
    assert (result["top1"], result["loss"]) == (logged["top1"], pytest.approx(logged["loss"], rel=1e-6))
    assert main(["export", str(run), str(tmp_path / "weights.safetensors")]) == 0
    assert "blocks.11.mlp.fc2.weight" in load_file(tmp_path / "weights.safetensors")
    photo.write_bytes(jpeg_bytes(3))
    assert main(["predict", str(run), str(photo)]) == 0
    assert logged_steps(run)[-1]["mfu"] < 1  # of the head's arithmetic, not of a backbone that did not run


# ---------------------------------------------------------------------- once, and whole
@torch.no_grad()
def test_each_row_is_what_the_backbone_gives_for_that_sample(shards: Path, cache: Path) -> None:
    (folder,) = cache.iterdir()
    trained = load_trained(cache.parent / "run", recipe_from_run(cache.parent / "run"), "last")
    for split, samples in (("train", sum(TRAIN)), ("val", 13), ("test", 10)):
        rows = torch.from_file(str(folder / f"{split}.features"), False, samples * 192 * 12).view(samples, 192, 12)
        seen = 0
        for batch in EvalLoader(trained.recipe.data, read_manifest(shards), split, trained.place, batch_size=50):
            expected = trained.model.backbone(batch.images)
            torch.testing.assert_close(rows[batch.samples], expected, rtol=1e-4, atol=1e-5)
            seen += len(batch.samples)
        assert seen == samples


def test_later_runs_take_what_is_there_whatever_their_head_and_rate(
    shards: Path, cache: Path, tmp_path: Path, computed: list[int]
) -> None:
    other = {"model__head": "ifa", "model__head_init": "mean", "optim__lr": 0.1, "train__batch_size": 72}
    assert train(shards, tmp_path / "run", **{**SHORT, **other}, data__feature_cache=cache) == 0
    assert computed == [1]  # the one that tells the shape
    assert len(list(cache.iterdir())) == 1


def test_a_store_is_found_by_the_arithmetic_that_auto_stands_for(
    shards: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    options = {**SHORT, "model__head": "ifa", "train__stop_after_steps": 1, "data__feature_cache": copy}
    assert train(shards, tmp_path / "named", **options, deepspeed__precision="float32") == 0
    assert len(list(copy.iterdir())) == 1
    # As where `auto` is bf16: the weights are the same, and the features may be of the same type.
    monkeypatch.setattr(features_module, "precision_of", lambda config: "bf16_autocast")
    assert train(shards, tmp_path / "other", **options) == 0
    assert len(list(copy.iterdir())) == 2


def test_a_backbone_that_calls_a_part_of_itself_features_has_a_store(tmp_path: Path) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [12]})
    options = {"model__backbone": "rexnet_100", "data__image_size": 32, "train__stop_after_steps": 1}
    assert train(shards, tmp_path / "run", **options, data__feature_cache=tmp_path / "cache") == 0
    (folder,) = (tmp_path / "cache").iterdir()
    assert json.loads((folder / "store.json").read_text())["features"] == "pooled"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["data__image_size=24", "train__seed=1", "data__mean=[0.4,0.5,0.5]", "model__head=cls"])
def test_other_images_weights_or_features_are_other_stores(
    shards: Path, cache: Path, tmp_path: Path, computed: list[int], key: str
) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    name, _, value = key.partition("=")
    options = {**SHORT, "model__head": "ifa", name: value, "train__stop_after_steps": 1}
    assert train(shards, tmp_path / "run", **options, data__feature_cache=copy) == 0
    assert len(list(copy.iterdir())) == 2 and sum(computed) > sum(TRAIN)


@pytest.mark.parametrize(
    "damage",
    ["a row", "a killed run", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a cut file", "a cut record"))],
)
def test_only_what_is_missing_or_damaged_is_computed_again(
    shards: Path, cache: Path, tmp_path: Path, computed: list[int], damage: str
) -> None:
    copy = shutil.copytree(cache, tmp_path / "cache")
    (folder,) = copy.iterdir()
    change: Callable[[], object] = {
        "a row": lambda: flip(folder / "train.features", 300 * 192 * 12 * 4),
        "a cut file": lambda: harness.cut(folder / "train.features", 1000),
        # As it is when the process ends in the second chunk: room, but no line.
        "a killed run": lambda: (folder / "train.jsonl").write_text(
            "".join(line for line in (folder / "train.jsonl").open() if json.loads(line)["chunk"] == 0)
        ),
        "a cut record": lambda: harness.cut(folder / "train.jsonl", 5),
    }[damage]
    change()
    assert train(shards, tmp_path / "run", **SHORT, model__head="ifa", data__feature_cache=copy) == 0
    second = sum(TRAIN) - 256
    assert computed == [1, *[12] * -(-second // 12)]
    assert same(newest_weights(tmp_path / "run"), newest_weights(cache.parent / "run"))


def test_a_stopped_run_goes_on_bit_for_bit(shards: Path, cache: Path, tmp_path: Path, computed: list[int]) -> None:
    options = {**SHORT, "model__head": "ifa", "data__feature_cache": cache}
    assert train(shards, tmp_path / "run", **options, train__stop_after_steps=2) == 0
    assert train(shards, tmp_path / "run", "auto", **options) == 0
    assert same(newest_weights(tmp_path / "run"), newest_weights(cache.parent / "run"))
    assert numbers(tmp_path / "run") == numbers(cache.parent / "run")
    assert computed == [1, 1]


def test_checkpoints_are_written_where_val_is_evaluated(shards: Path, cache: Path, tmp_path: Path) -> None:
    options = {**SHORT, "model__head": "ifa", "train__epochs": 4, "train__eval_every": 2, "train__keep_checkpoints": 9}
    assert train(shards, tmp_path / "run", **options, data__feature_cache=cache) == 0
    assert [read_step(checkpoint) for checkpoint in list_checkpoints(tmp_path / "run")] == [12, 24]


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "stage"), [(2, 3), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_several_ranks_share_the_work_and_have_the_numbers_of_one(
    shards: Path, cache: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    options = {**SHORT, "model__head": "ifa", "data__feature_cache": tmp_path / "cache"}
    train_on(ranks, arguments(shards, tmp_path / "run", **options, deepspeed__zero_stage=stage), tmp_path)
    agree(tmp_path / "run", cache.parent / "run", 1e-5)
    (folder,), (expected,) = (tmp_path / "cache").iterdir(), cache.iterdir()
    assert folder.name == expected.name
    assert (folder / "train.features").read_bytes() == (expected / "train.features").read_bytes()
    chunks = [json.loads(line)["chunk"] for line in (folder / "train.jsonl").open()]
    assert sorted(chunks) == [0, 1]  # each once


def test_bad_samples_are_left_out_and_recorded_by_the_run_that_meets_them_and_by_later_ones(
    tmp_path: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shard_set(tmp_path / "set", {"train": [30], "val": [12]}, replace={7: b"none", 33: b"none"})
    options = {**SHORT, "train__batch_size": 10, "train__epochs": 3}
    assert train(shards, tmp_path / "plain", **options) == 0
    for name in ("first", "second"):
        assert train(shards, tmp_path / name, **options, data__feature_cache=tmp_path / "cache") == 0
        agree(tmp_path / name, tmp_path / "plain")
        left_out = [json.loads(line) for line in (tmp_path / name / "quarantine.jsonl").open()]
        assert sorted((entry["split"], entry["sample"]) for entry in left_out) == [("train", 7), ("val", 3)]
        assert all(entry["reason"] for entry in left_out)
        assert evaluations(tmp_path / name)[-1]["bad_samples"] == 1
    assert computed.count(1) == 2
    few = {"data__max_bad_samples": 1, "data__feature_cache": tmp_path / "cache"}
    assert train(shards, tmp_path / "third", **options, **few) == 1
    assert "more than data.max_bad_samples (1)" in capsys.readouterr().err


# ---------------------------------------------------------------------- what cannot be
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"data__flip": "true", "data__hue": 0.1}, "nothing may augment it; set data.flip false, data.hue 0"),
        ({"data__mixup": 0.2}, "set data.mixup 0"),
        ({"model__freeze": "none"}, "use model.freeze backbone"),
        ({"model__freeze": 3}, "use model.freeze backbone"),
        ({"model__text_tokens": 4}, "use model.text_tokens 0"),
        ({"data__feature_cache": "s3://bucket/features"}, "must be a folder, not a URL"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], line: str
) -> None:
    assert train(shards, tmp_path / "run", **{"data__feature_cache": tmp_path / "cache", **options}) == 2
    assert line in error_line(capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert train(shards, tmp_path / "run", data__feature_cache=tmp_path / "file") == 1
    assert "choose another data.feature_cache" in error_line(capsys.readouterr().err)
