"""Loss surfaces: directions and numbers by independent computations, two small trained runs from end to end."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks import result
from benchmarks.charts import png
from benchmarks.claims import landscape, landscape_run
from benchmarks.claims.surface import (
    gaussian,
    grid,
)
from dist_train.cli import main, recipe_from_run
from dist_train.data.draws import random_bits
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest, write_manifest
from dist_train.errors import UseError, WorkError
from dist_train.models.build import build_model
from dist_train.models.saved import newest_checkpoint, read_weights
from dist_train.place import Place
from dist_train.use.trained import load_trained
from tests import harness
from tests.harness import CLASSES, write_shard_set

TEST = [7, 6]
SMALL = {"split": "test", "samples": 7, "points": 3, "radius": 0.5, "line_points": 4, "seed": 0, "directions": 2}
SMALL |= {"hessian_steps": 2}


def train(shards: Path, run: Path, **changes: object) -> Path:
    """Two steps at 32 px, with dropout, so that a surface that is not in evaluation mode would differ."""
    small = {"data__image_size": 32, "data__crop_margin": 8, "model__backbone": "vit_tiny_patch16"}
    small |= {"optim__lr": 0.05, "optim__schedule": "constant", "model__dropout": 0.1}
    small |= {"train__epochs": 1, "train__batch_size": 24, "train__eval_batch_size": 4}
    assert harness.train(shards, run, **small | changes) == 0
    return run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [30, 18], "test": TEST}, baked=40)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        head: train(shards, folder / f"{head}-run", model__head=head, model__head_init="default")
        for head in ("cls", "ifa")
    }


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "landscape"


def measure(runs: list[Path], name: str = "small", **overrides: Any) -> dict[str, Any]:
    return json.loads(landscape.run(landscape.Arguments(runs, name, **(SMALL | overrides))).read_bytes())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def float64_loss(recipe: Any, shards: Path, weights: dict[str, torch.Tensor], samples: int) -> tuple[float, float]:
    """Loss and top-1 on the first test samples, in float64, in one batch."""
    model, _ = build_model(recipe.model, 32, CLASSES)
    model.load_state_dict(weights)
    (batch,) = EvalLoader(recipe.data, read_manifest(shards), "test", Place(), batch_size=sum(TEST))
    with torch.no_grad():
        logits = model.double().eval()(batch.images[:samples].double())
    labels = batch.labels[:samples]
    return functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------------- trained runs
def test_the_surface_of_trained_runs_is_that_of_their_weights_on_the_samples(
    runs: dict[str, Path], shards: Path, results: Path
) -> None:
    document = measure(list(runs.values()))
    assert [(row["run"], row["head"], row["samples"]) for row in document["rows"]] == [
        ("cls-run", "cls", 7),
        ("ifa-run", "ifa", 7),
    ]
    assert document["parameters"]["manifest_digest"] == read_manifest(shards).digest
    for i, (row, run) in enumerate(zip(document["rows"], runs.values(), strict=True)):
        recipe, weights = recipe_from_run(run), read_weights(newest_checkpoint(run))
        arrays = read_arrays(results / f"small-{i}-{run.name}.npz")
        assert (
            set(arrays) == {"a", "b", "loss", "top1", "t", "line_loss"} and row["arrays"] == f"small-{i}-{run.name}.npz"
        )
        loss, top1 = float64_loss(recipe, shards, weights, 7)
        assert row["loss"] == pytest.approx(loss, rel=1e-5) and row["top1"] == pytest.approx(top1)
        assert arrays["loss"][1, 1] == pytest.approx(loss, rel=1e-5)
        # A corner, from directions made with numpy.
        one, other = (
            {
                name: torch.from_numpy(_normalised(gaussian(0, number, name, tensor.shape).numpy(), tensor.numpy()))
                for name, tensor in weights.items()
                if tensor.ndim > 1 and not name.endswith(("cls_token", "pos_embed"))
            }
            for number in (1, 2)
        )
        moved = {n: w + 0.5 * one[n] - 0.5 * other[n] if n in one else w for n, w in weights.items()}
        loss, top1 = float64_loss(recipe, shards, moved, 7)
        assert arrays["loss"][2, 0] == pytest.approx(loss, rel=1e-4) and arrays["top1"][2, 0] == pytest.approx(top1)
        assert abs(arrays["loss"][2, 0] - arrays["loss"][0, 2]) > 1e-3  # else axes could be exchanged unseen
        # Two thirds of the way from the initial weights, made as the loop makes them.
        torch.manual_seed(int(random_bits(recipe.train.seed, 5) >> 1))
        initial = build_model(recipe.model, 32, CLASSES)[0].state_dict()
        t = arrays["t"][2]
        assert arrays["t"].tolist() == pytest.approx([-0.2, 0.8 / 3, 2.2 / 3, 1.2])
        loss, _ = float64_loss(recipe, shards, {n: (1 - t) * initial[n] + t * weights[n] for n in weights}, 7)
        assert arrays["line_loss"][2] == pytest.approx(loss, rel=1e-4)
        assert row["line"] == 4 and row["line_barrier"] >= 0
    assert not list(results.glob("*.work.npz"))


def _normalised(noise: np.ndarray, weight: np.ndarray) -> np.ndarray:
    rows = [d * (np.linalg.norm(w.ravel()) / np.linalg.norm(d.ravel())) for d, w in zip(noise, weight, strict=True)]
    return np.stack(rows).astype(np.float32)


def test_at_the_centre_of_the_whole_split_is_the_runs_own_evaluation(runs: dict[str, Path], results: Path) -> None:
    (row,) = measure([runs["ifa"]], samples=1000)["rows"]
    evaluation = json.loads((runs["ifa"] / "summary.json").read_text())["evaluations"]["test"]
    assert row["samples"] == evaluation["samples"] == sum(TEST)
    assert row["loss"] == pytest.approx(evaluation["loss"], rel=1e-5) and row["top1"] == pytest.approx(
        evaluation["top1"]
    )


def test_the_initial_weights_are_those_that_the_loop_began_with(shards: Path, tmp_path: Path) -> None:
    run = train(shards, tmp_path / "still", optim__lr=0, model__head="ifa")
    recipe = recipe_from_run(run)
    trained = load_trained(run, recipe, "last", False)
    before = torch.random.get_rng_state()
    initial = landscape_run.initial_weights(recipe, trained)
    assert (torch.random.get_rng_state() == before).all()
    weights = read_weights(newest_checkpoint(run))
    assert initial.keys() == weights.keys() and all((initial[name] == weights[name]).all() for name in weights)


def test_a_classifier_of_other_classes_is_not_among_the_initial_weights(
    shards: Path, tmp_path: Path, shard_set: Callable[..., Path]
) -> None:
    """As in a training, which leaves it out though its shape fits."""
    pretrained = train(shards, tmp_path / "pretrained")
    others = shard_set({"train": [24], "test": [5]}, "others", baked=40)
    manifest = read_manifest(others)
    renamed = tuple(replace(info, name=f"other {info.name}") for info in manifest.classes)
    write_manifest(others, replace(manifest, classes=renamed))
    run = train(others, tmp_path / "still", optim__lr=0, model__weights=pretrained)
    recipe, weights = recipe_from_run(run), read_weights(newest_checkpoint(run))
    initial = landscape_run.initial_weights(recipe, load_trained(run, recipe, "last", False))
    assert [name for name in weights if not torch.equal(initial[name], weights[name])] == []


def test_bad_samples_are_left_out_of_the_subset(
    runs: dict[str, Path], shards: Path, shard_set: Callable[..., Path]
) -> None:
    damaged = shard_set({"train": [30, 18], "test": TEST}, baked=40, replace={48 + 5: b"no image"})
    recipe = recipe_from_run(runs["cls"])
    trained = load_trained(runs["cls"], recipe, "last", False)
    recipe.data.shards = str(damaged)
    batches = landscape_run.hold_subset(trained, recipe, read_manifest(damaged), "test", 7)
    assert np.concatenate([batch.samples for batch in batches]).tolist() == [0, 1, 2, 3, 4, 6]
    assert all(len(batch.labels) == len(batch.images) == len(batch.samples) for batch in batches)


# ---------------------------------------------------------------------- interruption
def test_interrupted_and_resumed_it_ends_with_identical_arrays(
    runs: dict[str, Path], results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = list(runs.values())
    straight = measure(both, "straight")
    calls = 0
    per_run = 5 + 9 + 6  # the centre with its neighbours, the plane, the line with its ends

    def count_or_fail(after: int) -> None:
        def counted(*arguments: Any) -> tuple[float, float]:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return original(*arguments)

        monkeypatch.setattr(landscape_run, "loss_and_top1", counted)

    original = landscape_run.loss_and_top1
    for after, done in ((11, 9), (8, 9 + 6), (12, 9 + 11 + 6)):  # in the plane; in the line; in the second run
        calls = 0
        count_or_fail(after)
        with pytest.raises(KeyboardInterrupt):
            measure(both, "killed")
        assert sum(len(read_arrays(work)["values"]) for work in results.glob("killed*.work.npz")) == done
        assert not list(results.glob("killed*.json"))
    calls = 0
    count_or_fail(1000)
    resumed = measure(both, "killed")
    assert calls == 2 * per_run - done
    for row, other in zip(straight["rows"], resumed["rows"], strict=True):
        one, two = read_arrays(results / row["arrays"]), read_arrays(results / other["arrays"])
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
        assert {k: v for k, v in row.items() if k != "arrays"} == {k: v for k, v in other.items() if k != "arrays"}


@pytest.mark.parametrize("harm", ["cut", "bytes", "pickle", "seed", "shape"])
def test_a_work_file_that_is_damaged_or_of_another_measurement_is_started_over(
    runs: dict[str, Path], results: Path, harm: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = results / "small-0-cls-run.work.npz"
    original = landscape_run.loss_and_top1
    values = iter([(99.0, 0.5)] * 11)  # of what must not be taken over

    def wrong(*_: Any) -> tuple[float, float]:
        try:
            return next(values)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(landscape_run, "loss_and_top1", wrong)
    with pytest.raises(KeyboardInterrupt):
        measure([runs["cls"]], seed=1 if harm == "seed" else 0)
    monkeypatch.setattr(landscape_run, "loss_and_top1", original)
    content = work.read_bytes()
    arrays = read_arrays(work)
    if harm == "cut":
        work.write_bytes(content[: len(content) // 2])
    elif harm == "bytes":
        middle = content.index(np.float64(99).tobytes())
        work.write_bytes(content[:middle] + bytes(8) + content[middle + 8 :])
    elif harm == "pickle":
        np.savez(work.open("wb"), **(arrays | {"values": np.array([None])}), allow_pickle=True)
    elif harm == "shape":
        np.savez(work.open("wb"), **(arrays | {"values": arrays["values"][:, :1]}))
    with caplog.at_level(logging.WARNING, "benchmarks.claims.landscape_run"):
        (row,) = measure([runs["cls"]])["rows"]
    warnings = [record.getMessage() for record in caplog.records if str(work) in record.getMessage()]
    assert len(warnings) == 1 and "measuring from the start" in warnings[0] and "\n" not in warnings[0]
    assert read_arrays(results / row["arrays"])["loss"].max() < 99 and row["loss"] < 99


# ---------------------------------------------------------------------- what cannot be
def test_what_cannot_be_measured_is_one_clear_line(
    runs: dict[str, Path], shards: Path, results: Path, tmp_path: Path, shard_set: Callable[..., Path]
) -> None:
    run = [runs["cls"]]
    for overrides, message in (
        ({"points": 4}, "--points: 4 is not an odd number.*use 5"),
        ({"points": 1}, "--points: 1 is not.*use 3"),
        ({"radius": 0.0}, "--radius: 0.0 is not above 0"),
        ({"radius": math.inf}, "--radius: inf"),
        ({"samples": 0}, "--samples: 0"),
        ({"line_points": 1}, "--line-points: 1"),
        ({"directions": -1}, "--directions: -1 is below 0"),
        ({"hessian_steps": -1}, "--hessian-steps: -1 is below 0"),
        ({"split": "val"}, "no split 'val', only test, train"),
    ):
        with pytest.raises(UseError, match=message):
            measure(run, **overrides)
    with pytest.raises(UseError, match="none: no run here"):
        measure([*run, tmp_path / "none"])
    with pytest.raises(UseError, match="no run given"):
        measure([])
    other = train(shard_set({"train": [24], "test": [5]}, baked=40), tmp_path / "other")
    with pytest.raises(UseError, match=r"other: its shard set .* has digest .* compare runs of one shard set"):
        measure([*run, other])
    (shards_of_other := tmp_path / "set").rename(tmp_path / "moved")
    write_shard_set(shards_of_other, {"train": [25], "test": [5]}, baked=40)
    with pytest.raises(UseError, match=r"other: trained on a shard set of digest .* put the set back"):
        measure([other])
    for checkpoint in (other / "checkpoints").glob("step-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    with pytest.raises(UseError, match="other: no complete checkpoint"):
        measure([other])
    assert not list(results.glob("*"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, points: int) -> None:
    original, left = landscape_run.loss_and_top1, iter(range(points))

    def counted(*arguments: Any) -> tuple[float, float]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(landscape_run, "loss_and_top1", counted)


def test_without_the_starting_weights_there_is_no_line_and_the_row_says_so(
    shards: Path, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start.safetensors"
    pretrained = train(shards, tmp_path / "pretrained")
    assert main(["export", str(pretrained), str(start)]) == 0
    run = train(shards, tmp_path / "tuned", model__weights=start)
    (row,) = measure([run], "with")["rows"]
    assert row["line"] == 4 and "line_note" not in row
    weights, recipe = read_weights(newest_checkpoint(pretrained)), recipe_from_run(run)
    initial = landscape_run.initial_weights(recipe, load_trained(run, recipe, "last", False))
    assert all((initial[name] == weights[name]).all() for name in weights)
    interrupt_after(monkeypatch, 5 + 9 + 2)  # in the line, of which no more can be measured afterwards
    with pytest.raises(KeyboardInterrupt):
        measure([run], "without")
    monkeypatch.undo()
    monkeypatch.setattr(result, "RESULTS", results.parent)
    start.unlink()
    (row,) = measure([run], "without")["rows"]
    assert row["line"] is None and row["line_barrier"] is None and f"there is no file {start}" in row["line_note"]
    arrays = read_arrays(results / row["arrays"])
    assert arrays["t"].shape == arrays["line_loss"].shape == (0,) and arrays["loss"].shape == (3, 3)


# ---------------------------------------------------------------------- the picture
def test_without_matplotlib_the_result_is_there_and_one_line_says_how_to_get_the_picture(
    runs: dict[str, Path], results: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING, "benchmarks.claims.landscape"):
        measure([runs["cls"]])
    (line,) = [record.getMessage() for record in caplog.records if "matplotlib" in record.getMessage()]
    assert "pip install -e '.[benchmarks]'" in line and str(results / "small.json") in line and "\n" not in line
    assert (results / "small-0-cls-run.npz").exists() and not (results / "small.png").exists()


def test_the_picture_is_drawn_from_the_result_and_its_arrays(results: Path) -> None:
    pytest.importorskip("matplotlib")
    results.mkdir(parents=True)
    rows = []
    axis = grid(11, 1.0)
    for i, (head, batch) in enumerate([("cls", 16), ("cls", 256), ("ifa", 16), ("ifa", 256), ("ifa", 512)]):
        loss = 0.01 + (1 + i) * (axis[:, None] ** 2 + 2 * axis[None, :] ** 2)
        loss[0, 0] = np.inf
        np.savez(results / f"x-{i}.npz", a=axis, b=axis, loss=loss)
        row = {"run": f"vit_base_patch32-{head}-batch{batch}-seed0", "head": head, "batch_size": batch}
        rows.append(row | {"image_size": 128, "loss": 0.01, "top1": 0.9, "arrays": f"x-{i}.npz"})
    (chart,) = landscape.charts({"rows": rows})
    content = png(chart)
    assert chart.name == "" and content[:8] == b"\x89PNG\r\n\x1a\n" and b"Matplotlib" not in content
    assert png(chart) == content
    np.savez(results / "x-0.npz", a=axis, b=axis, loss=np.full((11, 11), np.nan))
    assert landscape.charts({"rows": rows[:1]}) == []  # nothing to draw
    (results / "x-1.npz").write_bytes(b"")
    with pytest.raises(WorkError, match=r"x-1\.npz: cannot be read .*measure again"):
        landscape.charts({"rows": rows})
