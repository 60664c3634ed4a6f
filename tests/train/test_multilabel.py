"""Training on tags: targets, loss, checkpoints and commands, each against its definition."""

from __future__ import annotations

import csv
import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch.nn import functional

from dist_train.cli import main, parse_recipe
from dist_train.config import DataConfig, OptimConfig
from dist_train.data.draws import random_bits
from dist_train.data.loader import Batch, EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.targets import TagTargets
from dist_train.models.build import build_model
from dist_train.models.saved import list_checkpoints, newest_checkpoint, read_class_names, read_thresholds
from dist_train.place import Place
from dist_train.train.losses import Objective, tag_losses
from dist_train.train.mixing import mix_neighbours
from tests import harness
from tests.harness import error_line, evaluations, jpeg_bytes, logged_steps, newest_weights, same, write_shard_set
from tests.train.forked_ranks import train_on

OPTIONS: dict[str, object] = {
    "data__labels": "tags",
    "data__tag_min_count": 2,
    "optim__lr": 0.01,
    "train__batch_size": 8,
}
arguments, train = (partial(function, **OPTIONS) for function in (harness.arguments, harness.train))
TAGS = ["b0", "b1", "b2", "b3"]


def tags_of(number: int) -> str:
    """Of sample n the bits of n, and a tag of its own; one in eight has none that is known."""
    bits = [f"b{k}" for k in range(4) if number >> k & 1 and number % 8]
    return " ".join([*bits, f"only{number}"] if number % 5 else bits)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "set"
    return write_shard_set(folder, {"train": [16, 16], "val": [8, 3], "test": [10]}, baked=20, text=tags_of)


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of 8 steps with averaged weights, evaluated at 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(shards, run, train__ema=0.5) == 0
    return run


def test_targets_are_the_known_tags_of_each_sample_over_world_sizes_and_in_evaluation(shards: Path) -> None:
    config = DataConfig(shards=str(shards), image_size=16, crop_margin=4, threads=1, labels="tags")
    targets, manifest = TagTargets(["b2", "b0", "never"]), read_manifest(shards)

    def expected(number: int) -> list[bool]:
        known = tags_of(number).split()
        return ["b2" in known, "b0" in known, False]

    for world_size in (1, 2):
        seen: dict[int, list[bool]] = {}
        for rank in range(world_size):
            options: Any = {"batch_size": 16, "micro_batch": 4, "seed": 1, "tag_targets": targets}
            loader = TrainLoader(config, manifest, Place(rank, world_size), **options)
            for batch in islice(loader, 8 // world_size):
                assert batch.tags is not None and batch.tags.dtype == torch.bool and batch.targets is batch.tags
                seen |= dict(zip(batch.samples.tolist(), batch.tags.tolist(), strict=True))
        assert seen == {number: expected(number) for number in range(32)}
        assert [False] * 3 in seen.values()
    (batch,) = EvalLoader(config, manifest, "val", Place(), batch_size=11, tag_targets=targets)
    assert batch.tags is not None and batch.tags.tolist() == [expected(32 + i) for i in range(11)]
    assert targets([]).shape == (0, 3)


def test_the_loss_is_pytorchs_with_timms_smoothing_weighs_positives_and_mixes_targets() -> None:
    torch.manual_seed(0)
    logits, classes = torch.randn(6, 5), torch.arange(6) % 5
    one_hot = functional.one_hot(classes, 5).bool()
    timms = BinaryCrossEntropy(smoothing=0.1)(logits, classes)
    torch.testing.assert_close(tag_losses(logits, one_hot, smoothing=0.1).mean(), timms)
    tags = torch.rand(6, 5) > 0.5
    p = logits.double().sigmoid()
    by_hand = -(3 * tags * p.log() + ~tags * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(tag_losses(logits, tags, positive_weight=3).double(), by_hand, rtol=1e-5, atol=1e-6)

    weights = torch.tensor([1.0, 1, 1, 1, 0, 1])
    batch = Batch(torch.rand(6, 3, 8, 8), classes, weights, None, None, classes.numpy(), tags)
    mixed, mix = mix_neighbours(DataConfig(mixup=0.8), batch, seed=1, step=2, position=0)
    assert mix is not None and mixed.targets is tags
    partner = tags[[1, 0, 3, 2, 5, 4]]
    share = mix.share[:, None]
    assert (mix.share[:4] < 1).all() and (mix.share[4:] == 1).all()  # a pair with an unusable sample stays as it is
    blended = share * tags + (1 - share) * partner
    losses = functional.binary_cross_entropy_with_logits(logits, blended, reduction="none").mean(dim=1)
    objective = Objective(OptimConfig(), [1] * 5, torch.device("cpu"))
    torch.testing.assert_close(objective(logits, mixed.targets, weights, mix), (losses * weights).sum() / 6)


def test_training_follows_a_plain_loop(shards: Path, tmp_path: Path) -> None:
    options = {"optim__label_smoothing": 0.1, "optim__positive_weight": 2, "data__mixup": 0.4}
    assert train(shards, tmp_path / "run", **options) == 0
    recipe, _ = parse_recipe(arguments(shards, tmp_path / "run", **options))
    torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
    model, _ = build_model(recipe.model, 16, 4)
    outputs = read_class_names(newest_checkpoint(tmp_path / "run"))
    assert sorted(outputs) == TAGS and (tmp_path / "run/tags.txt").read_text().split() == outputs
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    targets = TagTargets(outputs)
    loader = iter(
        TrainLoader(
            recipe.data, read_manifest(shards), Place(), batch_size=8, micro_batch=8, seed=0, tag_targets=targets
        )
    )
    steps = logged_steps(tmp_path / "run")
    for entry in steps:
        optimizer.param_groups[0]["lr"] = entry["lr"]
        batch, mix = mix_neighbours(recipe.data, next(loader), 0, entry["step"] - 1, 0)
        own = torch.tensor([[tag in tags_of(n).split() for tag in outputs] for n in batch.samples]).float()
        other = own[[1, 0, 3, 2, 5, 4, 7, 6]]
        soft = mix.share[:, None] * own + (1 - mix.share[:, None]) * other
        goal = 0.9 * soft + 0.1 / 4
        loss = functional.binary_cross_entropy_with_logits(model(batch.images), goal, pos_weight=torch.full((4,), 2.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert entry["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert len(steps) == 8


def test_stopped_and_resumed_runs_and_two_ranks_end_alike(finished: Path, shards: Path, tmp_path: Path) -> None:
    stopped, two = tmp_path / "stopped", tmp_path / "two"
    options = {"train__ema": 0.5, "train__micro_batch_size": 4}
    for step in (3, 4, 0):
        assert train(shards, stopped, "auto", train__stop_after_steps=step, train__ema=0.5) == 0
    assert same(newest_weights(finished), newest_weights(stopped))
    assert evaluations(finished) == evaluations(stopped)
    last = [newest_checkpoint(run) for run in (finished, stopped)]
    for averaged in (False, True):
        one, other = (read_thresholds(checkpoint, averaged) for checkpoint in last)
        assert one == other and one is not None and len(one) == 4
    # Step 3 lies within an epoch, where nothing is evaluated: its checkpoint has no thresholds.
    assert train(shards, tmp_path / "third", train__stop_after_steps=3) == 0
    assert read_thresholds(list_checkpoints(tmp_path / "third")[0]) is None
    train_on(2, arguments(shards, two, **options), tmp_path)
    for mine, theirs in zip(logged_steps(finished), logged_steps(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for mine, theirs in zip(evaluations(finished), evaluations(two), strict=True):
        assert mine.pop("split") == theirs.pop("split") and mine == pytest.approx(theirs, rel=1e-4)
    assert (two / "tags.txt").read_text() == (finished / "tags.txt").read_text()


def test_evaluate_says_what_was_logged_and_has_a_table_of_the_tags_at_the_thresholds_of_val(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = {entry["split"]: entry for entry in evaluations(finished)}
    assert set(logged) == {"val", "val_ema", "test", "test_ema"}
    summary = harness.read_summary(finished)
    assert summary["best_val_map"] == max(e["map"] for e in evaluations(finished) if e["split"] == "val")
    assert summary["evaluations"]["test"]["tuned_f1_macro"] == logged["test"]["tuned_f1_macro"]
    for flags, split in (([], "test"), (["--ema"], "test_ema")):
        capsys.readouterr()
        table = tmp_path / f"{split}.csv"
        words = ["evaluate", str(finished), "--checkpoint", "last", "--csv", str(table), *flags]
        assert main(words) == 0
        figures = json.loads(capsys.readouterr().out)
        for name in ("map", "f1_micro", "f1_macro", "tuned_f1_micro", "tuned_precision_macro", "loss", "samples"):
            assert figures[name] == pytest.approx(logged[split][name], rel=1e-5), name
        rows = list(csv.DictReader(table.open(encoding="utf-8")))
        outputs = read_class_names(newest_checkpoint(finished))
        assert [row["tag"] for row in rows] == outputs
        texts = [tags_of(number).split() for number in range(43, 53)]
        assert [int(row["positives"]) for row in rows] == [sum(tag in text for text in texts) for tag in outputs]
        thresholds = read_thresholds(newest_checkpoint(finished), averaged=bool(flags))
        assert [float(row["threshold"]) for row in rows] == pytest.approx(thresholds, abs=5e-5)
        assert figures["map"] == pytest.approx(sum(float(row["average_precision"]) for row in rows) / 4, abs=1e-4)
        hits = sum(int(row["hits"]) for row in rows)
        assert figures["tuned_recall_micro"] == hits / sum(int(row["positives"]) for row in rows)


def test_predict_names_the_most_probable_tags_or_all_above_a_threshold_and_grid_draws_them(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.jpg"
    image.write_bytes(jpeg_bytes(50, 20, 20))

    def predicted(*words: str) -> dict[str, float]:
        capsys.readouterr()
        assert main(["predict", str(finished), str(image), "--checkpoint", "last", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == str(image)
        found = {name: float(probability) for probability, name in map(str.split, lines[1:])}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        return found

    everything = predicted()
    assert sorted(everything) == TAGS and sum(everything.values()) > 1.2  # each on its own
    assert predicted("--threshold", "0") == everything and predicted("--threshold", "1") == {}
    assert len(predicted("--top", "2")) == 2
    middle = sorted(everything.values())[2]
    above = {name for name, value in everything.items() if value >= middle}
    assert set(predicted("--threshold", str(middle - 1e-4))) == above
    outputs = read_class_names(newest_checkpoint(finished))
    own = dict(zip(outputs, read_thresholds(newest_checkpoint(finished)) or [], strict=True))
    assert set(predicted("--threshold", "best")) == {name for name in TAGS if everything[name] >= own[name]}
    assert main(["grid", str(finished), "--output", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert main(["predict", str(finished), str(image), "--threshold", "2"]) == 2


def test_thresholds_that_were_never_chosen_are_not_made_up(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(shards, run, train__stop_after_steps=1) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    said = capsys.readouterr()
    assert "has no thresholds" in said.err and not any(name.startswith("tuned") for name in json.loads(said.out))
    assert main(["predict", str(run), str(tmp_path / "x.jpg"), "--threshold", "best"]) == 2
    assert "was not evaluated on val" in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model__text_tokens": 8}, "would read its answer"),
        ({"optim__class_weights": "inverse"}, "optim.positive_weight weighs tags"),
        ({"data__labels": "class", "optim__positive_weight": 2}, "it needs data.labels tags"),
        ({"data__labels": "both"}, "data.labels"),
        ({"data__tag_min_count": 33}, "no tag is on data.tag_min_count 33 images"),
        ({"train__threshold": 1.5}, "train.threshold is 1.5"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object], line: str
) -> None:
    assert train(shards, tmp_path / "run", **options) == 2
    assert line in error_line(capsys.readouterr().err)


def test_sets_without_tags_and_runs_of_other_labels_are_refused(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_shard_set(tmp_path / "bare", {"train": [8], "test": [2]}, baked=20)
    assert train(bare, tmp_path / "run") == 2
    assert "data.labels asks for tags, but the shard set" in error_line(capsys.readouterr().err)
    assert main(["evaluate", str(finished), "--shards", str(bare)]) == 2
    assert "has none" in error_line(capsys.readouterr().err)
    for change in ({"data__labels": "class"}, {"data__tag_min_count": 1}):
        assert train(shards, finished, "auto", train__ema=0.5, train__epochs=3, **change) == 2
        key = next(iter(change)).replace("__", ".")
        assert f"cannot be resumed: {key} was" in error_line(capsys.readouterr().err)
    of_classes = tmp_path / "classes"
    assert train(shards, of_classes, data__labels="class", train__stop_after_steps=1) == 0
    capsys.readouterr()
    assert main(["predict", str(of_classes), str(tmp_path / "x.jpg"), "--threshold", "0.5"]) == 2
    assert "predicts one class" in error_line(capsys.readouterr().err)


@pytest.mark.slow
def test_the_recipe_learns_the_tags_of_drawn_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its epochs the mAP on test is far above that of guessing, which is the share of images with a tag."""
    from shards.__main__ import main as shards_main

    drawn, run = tmp_path / "set", tmp_path / "run"
    assert shards_main(["demo", str(drawn), "--pictures", "1500", "--size", "36"]) == 0
    recipe = ["--config", str(harness.REPOSITORY / "launch/recipes/tags.yaml")]
    assert main(["train", *recipe, f"--data.shards={drawn}", f"--train.run={run}"]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    figures = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((run / "evaluation_test.csv").open(encoding="utf-8")))
    occur = [int(row["positives"]) for row in rows if int(row["positives"])]
    guessing = sum(occur) / len(occur) / figures["samples"]
    assert figures["map"] > 2 * guessing
    assert figures["tuned_f1_macro"] > figures["f1_macro"]  # rare tags seldom reach 0.5
