"""The measured knee: found in curves whose answer is known, and branches that are what they claim to be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import points, result
from benchmarks.benchmark import tables_of
from benchmarks.charts import png
from benchmarks.claims import knee, knee_run
from benchmarks.claims.knee_fit import (
    CONFIDENCE,
    Floats,
    Found,
    better_than_smallest,
    crossing,
    excess,
    find_knee,
    fit_critical,
)
from benchmarks.claims.knee_report import headline, in_words, knee_of, losses_of
from benchmarks.report import benchmark_of
from dist_train.config import Recipe
from dist_train.data.manifest import read_manifest
from dist_train.errors import UseError
from dist_train.parse import parse_recipe
from dist_train.place import Place
from dist_train.train.inputs import train_loader
from dist_train.train.loop import train
from tests.harness import REPOSITORY, evaluations, write_shard_set

BATCHES = [8, 16, 32, 64, 128, 256]
SIZES = np.array(BATCHES, float)


def losses(critical: float, seeds: int, noise: float, rng: np.random.Generator) -> Floats:
    """Branches from a loss of 3 by the samples that McCandlish et al. say a batch needs, with noise that a seed's
    branches share and noise of their own."""
    shared, own = rng.standard_normal((seeds, 1)), rng.standard_normal((seeds, len(SIZES)))
    return 3 - 0.5 / (1 + SIZES / critical) + 1.5 * noise * shared + noise * own


# ---------------------------------------------------------------------- where the knee is
@pytest.mark.parametrize("critical", [5, 20, 60, 150, 1000])
def test_without_noise_the_fitted_batch_is_that_of_the_curve(critical: float) -> None:
    exact = losses(critical, 1, 0, np.random.default_rng(0))
    assert fit_critical(exact, BATCHES, 3.0).value == pytest.approx(critical, rel=0.025)  # half a step of the search


def test_what_lies_beyond_the_measured_batches_is_said_to() -> None:
    level = np.full((2, 6), 2.0)
    assert find_knee(level, BATCHES, 0.1) == Found(math.inf, math.inf, math.inf)
    assert fit_critical(level, BATCHES, 3.0).value == math.inf
    assert math.isnan(fit_critical(level, BATCHES, 1.9).value)  # nothing was gained
    assert math.isnan(find_knee(level[:1], BATCHES, 0.1).low)  # one seed
    assert in_words(Found(37.2, 21.9, math.inf), BATCHES) == "37 (22 to beyond 256)"
    assert in_words(Found(12.0, 9.0, 15.0), BATCHES) == "below 16"
    assert in_words(Found(20.0, math.nan, math.nan), BATCHES) == "20 (one seed)"


def test_a_branch_that_diverged_is_worse_than_any() -> None:
    values = np.array([[2.0, 2.0, 2.0, math.nan, 2.0, 2.5], [2.1, 2.1, 2.1, 2.1, 2.1, math.inf]])
    assert excess(values)[0].tolist() == [0, 0, 0, math.inf, 0, 0.5]
    assert find_knee(values[:, :4], BATCHES[:4], 0.1) == Found(32, 32, 32)
    assert find_knee(values[:, :5], BATCHES[:5], 0.1).value == math.inf  # the largest is not worse
    with pytest.raises(ValueError, match="smallest batch has no finite loss"):
        excess(values[:, 3:])


def test_a_rate_that_does_not_suit_the_smallest_batch_is_said_not_to() -> None:
    values = losses(60, 4, 0.01, np.random.default_rng(0))
    assert better_than_smallest(values, BATCHES) is None
    values[:, 2] -= 0.2
    assert better_than_smallest(values, BATCHES) == 32
    assert better_than_smallest(values[:1], BATCHES) is None
    rows = [
        {"setting": "one", "stage": 0.5, "seed": seed, "batch": batch, "val_loss": loss}
        for seed, line in enumerate(values.tolist())
        for batch, loss in zip(BATCHES, line, strict=True)
    ]
    found = knee_of(rows, {"setting": "one", "stage": 0.5, "start_loss": 3.0}, 0.01)
    assert found["doubt"] == "32 is better than 8: the rate does not suit the smallest batch"


def test_every_batch_counts_at_the_rate_that_is_best_for_it_over_the_seeds() -> None:
    losses_by_batch = {  # of factors 0.5, 1 and 2, seed by seed
        4: [(1.2, 1.0, math.inf), (1.0, 1.1, 1.0)],  # 1 is best on average: 2 diverged once
        8: [(1.5, 1.4, 1.1), (1.5, 1.3, 1.2)],
        16: [(1.0, 1.4, 1.6), (2.5, 1.4, 1.6)],  # 0.5 is best in one seed alone
    }
    rows = [
        {"setting": "one", "stage": 0.5, "seed": seed, "batch": batch, "factor": factor}
        | {"val_loss": loss if math.isfinite(loss) else None}
        for batch, seeds in losses_by_batch.items()
        for seed, line in enumerate(seeds)
        for factor, loss in zip((0.5, 1.0, 2.0), line, strict=True)
    ]
    found = losses_of(rows, "one", 0.5)
    assert found is not None and found.factors == [1.0, 2.0, 1.0]
    assert found.values.tolist() == [[1.0, 1.1, 1.4], [1.1, 1.2, 1.4]]
    assert knee_of(rows, {"setting": "one", "stage": 0.5, "start_loss": 3.0}, 0.01)["factors"]["8"] == 2.0
    lowest = [row for row in rows if row["factor"] > 0.5]
    assert knee_of(rows, {"setting": "one", "stage": 0.5, "start_loss": 3.0}, 0.01)["doubt"] is None
    assert knee_of(lowest, {"setting": "one", "stage": 0.5, "start_loss": 3.0}, 0.01)["doubt"] == (
        "of the rates that 4 tried the lowest is the best: its loss may be lower at others"
    )
    short = losses_of(rows[:-1], "one", 0.5)  # a seed counts once all of its branches are there
    assert short is not None and short.seeds == [0]


def test_the_headline_of_many_knees_says_how_often_the_prediction_came_near() -> None:
    knee = {"stage": 0.5, "says": "16", "doubt": None}
    pairs = [(10.0, 20.0), (10.0, 21.0), (10.0, 5.0), (10.0, 30.0), (None, 10.0)]
    knees = [
        knee | {"setting": f"s{i}", "predicted": predicted, "fitted": fitted, "knee": None if i else 10.0}
        for i, (predicted, fitted) in enumerate(pairs)
    ]
    knees.append(knee | {"setting": "s0", "stage": 0.1, "predicted": 1.0, "fitted": 9.0, "doubt": "the rate"})
    said = headline({"rows": [], "knees": knees})
    assert said == (
        "5 settings, 6 stages; the knee is 1.0 times the gradient noise scale, 1.0 in the middle, and within a factor "
        "of 2 of it in 1 of the 1 that have both; the fitted batch is 0.5 to 3.0 times the gradient noise scale, 2.0 "
        "in the middle, and within a factor of 2 of it in 2 of the 4 that have both"
    )


def largest_within(differences: list[float], tolerance: float) -> float:
    """The knee by looking at many places between the batches."""
    places = np.linspace(3, 8, 20001)
    within = np.interp(places, np.log2(SIZES), differences) <= tolerance
    return math.inf if differences[-1] <= tolerance else 2 ** places[np.flatnonzero(within)[-1]]


DIFFERENCES = st.lists(st.floats(-1, 1).map(lambda value: round(value, 3)), min_size=5, max_size=5)


@given(DIFFERENCES, st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60)
def test_the_knee_is_the_last_batch_within_the_tolerance_and_grows_with_it(
    differences: list[float], one: float, other: float
) -> None:
    line = [0.0, *differences]
    low, high = (float(crossing(np.array([line]), BATCHES, tolerance)[0]) for tolerance in sorted((one, other)))
    assert low <= high
    assert low == pytest.approx(largest_within(line, min(one, other)), rel=1e-3)


@pytest.mark.parametrize("seeds", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Of 60 studies of a few seeds nine in ten, within three standard deviations of that count."""
    rng, critical, studies = np.random.default_rng(seeds), 60.0, 60
    curve = 0.5 / (1 + SIZES / critical)
    truth = largest_within(list(curve[0] - curve), 0.1)
    held = np.zeros(2, int)
    for _ in range(studies):
        values = losses(critical, seeds, 0.02, rng)
        knee_, fitted = find_knee(values, BATCHES, 0.1), fit_critical(values, BATCHES, 3.0)
        held += [knee_.low <= truth <= knee_.high, fitted.low <= critical <= fitted.high]
        assert knee_.low <= knee_.value <= knee_.high
    slack = 3 * math.sqrt(studies * CONFIDENCE * (1 - CONFIDENCE))
    assert (abs(held - CONFIDENCE * studies) <= slack).all(), held


def test_branches_of_a_noisy_quadratic_give_its_noise_scale() -> None:
    """Loss |x|^2 / 2, gradients of single samples x + noise: tr(S) / |G|^2 is known. Steps of SGD at a small part of
    each batch's best rate, which hardly change it, on the same samples for every batch."""
    dimensions, critical, samples, rate = 40, 64.0, 1024, 0.0005
    start = np.ones(dimensions)
    deviation = math.sqrt(critical * start @ start / dimensions)
    values = []
    for seed in range(6):
        noise = deviation * np.random.default_rng(seed).standard_normal((samples, dimensions))
        line = []
        for batch in BATCHES:
            x = start.copy()
            for part in noise.reshape(-1, batch, dimensions):
                x -= rate / (1 + critical / batch) * (x + part.mean(axis=0))
            line.append(x @ x / 2)
        values.append(line)
    found = fit_critical(np.array(values), BATCHES, float(start @ start) / 2)
    assert found.value == pytest.approx(critical, rel=0.05)


# ---------------------------------------------------------------------- the branches
@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    return tmp_path / "results" / "knee"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be asked of processes is done in this one, which has imported all it needs; the points asked for."""
    asked: list[dict[str, Any]] = []

    class Here:
        def __init__(self, function: str, *_: object, **__: object) -> None:
            assert function == "benchmarks.claims.knee_run:work"

        def ask(self, point: dict[str, Any]) -> Any:
            asked.append(point)
            return json.loads(json.dumps(knee_run.work(json.loads(json.dumps(point)))))

        def finish(self) -> None: ...

    monkeypatch.setattr(knee, "Child", Here)
    return asked


@pytest.fixture
def recipe(shard_set: Callable[..., Path], tmp_path: Path) -> Recipe:
    """Of 12 steps an epoch and 24 in all; AdamW, so that a lost optimizer state would show."""
    shards = shard_set({"train": [30, 18], "val": [7]}, baked=20)
    words = f"--data.shards {shards} --data.image_size 16 --data.crop_margin 4 --data.threads 1 --train.epochs 2 "
    words += "--model.backbone vit_tiny_patch8 --optim.name adamw --optim.lr 0.003 --optim.schedule constant "
    words += f"--train.batch_size 4 --train.log_every 4 --train.run {tmp_path / 'run'}"
    return parse_recipe(words.split())[0]


def test_branches_are_measured_once_and_reported(
    recipe: Recipe, results: Path, here: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the trunk to the report; the same command adds what is missing, another recipe is another setting."""
    asked = knee.Arguments("small", "one", largest=8, stages="0.5", steps=3, seeds=1)
    document = json.loads(knee.run(asked, recipe).read_bytes())
    rows = document["rows"]
    assert [(row["batch"], row["seed"], row["steps"], row["samples"]) for row in rows] == [(4, 0, 6, 24), (8, 0, 3, 24)]
    assert rows[1]["rate"] == pytest.approx(0.003 * math.sqrt(2))
    (found,) = document["knees"]
    assert (found["samples"], found["seeds"], found["knee_low"]) == (48, 1, None)
    trunk = (Path(recipe.train.run) / "trunk" / "metrics.jsonl").read_text().splitlines()
    (evaluated,) = (entry["loss"] for entry in map(json.loads, trunk) if entry.get("split") == "val")
    assert found["start_loss"] == pytest.approx(evaluated, rel=1e-6)
    assert all(row["val_loss"] != found["start_loss"] for row in rows)
    assert "says" in found and found["says"] in knee.BENCHMARK.headline(document)
    assert tables_of(benchmark_of("knee"), document)
    for chart in knee.BENCHMARK.charts(document):
        assert png(chart).startswith(b"\x89PNG")

    del here[:]
    again = json.loads(knee.run(replace(asked, seeds=2), recipe).read_bytes())
    assert again["rows"][:2] == rows and len(again["rows"]) == 4
    assert [point.get("seed") for point in here if point.get("samples")] == [1, 1]
    # The two batches are compared on the same samples: a branch that learned nothing would have the same loss on them.
    assert len({row["train_loss"] for row in again["rows"]}) == 4
    assert again["knees"][0]["seeds"] == 2 and again["knees"][0]["fitted"] is None  # two batches are too few to fit

    more = json.loads(knee.run(replace(asked, rate_factors="0.5,1"), recipe).read_bytes())
    assert more["rows"][:4] == again["rows"]  # what was measured at the rate itself counts as factor 1
    added = [(row["batch"], row["factor"], row["rate"]) for row in more["rows"][4:]]
    assert added == [(4, 0.5, 0.0015), (8, 0.5, pytest.approx(0.0015 * math.sqrt(2)))]

    other = replace(recipe, optim=replace(recipe.optim, lr=0.001))
    with pytest.raises(UseError, match="'one' was measured with another recipe"):
        knee.run(asked, other)
    with pytest.raises(UseError, match="holds branches of another recipe"):
        knee.run(replace(asked, setting="two"), other)
    write_shard_set(Path(recipe.data.shards), {"train": [30, 19], "val": [7]}, baked=20)
    elsewhere = replace(recipe, train=replace(recipe.train, run=f"{recipe.train.run}-2"))
    for base, setting, said in (
        (elsewhere, "one", "was measured with another recipe"),
        (recipe, "two", "recipe or set"),
    ):
        with pytest.raises(UseError, match=said):
            knee.run(replace(asked, setting=setting), base)


@pytest.mark.slow
def test_processes_of_their_own_measure_what_one_process_does(
    recipe: Recipe, results: Path, here: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, bit for bit, whatever the order in which they come."""
    asked = knee.Arguments("here", "one", largest=8, stages="0.25,0.5", steps=3, seeds=2)
    alone = json.loads(knee.run(asked, recipe).read_bytes())
    monkeypatch.setattr(knee, "Child", points.Child)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    elsewhere = replace(recipe, train=replace(recipe.train, run=f"{recipe.train.run}-2"))
    both = json.loads(knee.run(replace(asked, name="there", jobs=2), elsewhere).read_bytes())

    def losses_in(document: dict[str, Any]) -> dict[tuple[Any, ...], float]:
        return {(row["stage"], row["batch"], row["seed"]): row["val_loss"] for row in document["rows"]}

    assert len(here) == 2 * (2 + 4)
    assert losses_in(alone) == losses_in(both)


def test_a_branch_goes_on_where_the_trunk_was_with_its_weights_and_optimizer(recipe: Recipe, tmp_path: Path) -> None:
    """A branch of the trunk's own batch, rate and order, at the end of an epoch, is the trunk: bit for bit."""
    trunk = replace(recipe, train=replace(recipe.train, run=str(tmp_path / "run" / "trunk")))
    point = {"recipe": knee.asdict(trunk), "step": 12}
    assert knee_run.work(point) is True
    own_order = -1  # of the seeds that branches have, the trunk's comes before the first
    branch = knee_run.work(point | {"batch": 4, "seed": own_order, "rate": 0.003, "samples": 48})
    train(trunk, "auto")
    (last,) = (entry for entry in evaluations(Path(trunk.train.run)) if entry["step"] == 24 and entry["split"] == "val")
    assert branch["val_loss"] == last["loss"]


def test_branches_of_a_seed_see_the_same_samples_whatever_the_batch(recipe: Recipe) -> None:
    manifest, place = read_manifest(recipe.data.shards), Place(0, 1, 1, None)

    def seen(batch: int, seed: int) -> list[set[int]]:
        """In groups of 8."""
        branch = knee_run.branch_recipe(recipe, batch, seed)
        batches = iter(train_loader(branch, manifest, place, None, 48))
        groups = [np.concatenate([next(batches).samples for _ in range(8 // batch)]) for _ in range(3)]
        batches.close()  # type: ignore[attr-defined]
        return [set(group.tolist()) for group in groups]

    assert seen(4, 0) == seen(8, 0)
    assert seen(4, 0) != seen(4, 1)


def test_the_prediction_is_what_the_trunk_has_logged_before_the_branches(tmp_path: Path) -> None:
    none = {"predicted": None, "predicted_low": None, "predicted_high": None, "predicted_norms": None}
    lines: list[dict[str, Any]] = [{"step": 5, "lr": 0.1, "loss": 2.0}]
    scale = {"noise_scale": 40.0, "noise_scale_low": 30.0, "noise_scale_high": None, "noise_scale_norms": 17.5}
    lines += [{"step": 10, "lr": 0.1} | scale, {"step": 10, "split": "val", "loss": 2.0}]
    lines += [{"step": 15, "lr": 0.1} | dict.fromkeys(scale, 99.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert knee.predicted_batch(tmp_path, 5) == none
    assert knee.predicted_batch(tmp_path, 12) == dict(zip(none, scale.values(), strict=True))


def test_a_key_that_another_version_did_not_have_makes_no_other_setting() -> None:
    before = {"recipe": {"train": {"seed": 0}}, "samples_per_branch": 24}
    assert knee.alike({"recipe": {"train": {"seed": 0, "noise_every": 0}}, "samples_per_branch": 24}, before)
    assert not knee.alike({"recipe": {"train": {"seed": 1, "noise_every": 0}}, "samples_per_branch": 24}, before)
    assert not knee.alike({"recipe": {"train": {"seed": 0}}, "samples_per_branch": 48}, before)


def test_what_cannot_be_is_refused_before_anything_is_trained(recipe: Recipe, results: Path) -> None:
    for option, value, said in (
        ("largest", 12, "not 2, 4, 8, ... times train.batch_size 4"),
        ("largest", 4, "not 2, 4, 8"),
        ("stages", "0.5,1.2", "between 0 and 1"),
        ("stages", "half", "numbers separated by commas"),
        ("stages", "0.01", "is step 0 of 24"),
        ("steps", 0, "not at least 1"),
        ("jobs", 0, "not at least 1"),
        ("tolerance", 0.0, "not above 0"),
        ("rate_factors", "1,0", "numbers above 0"),
    ):
        with pytest.raises(UseError, match=said):
            knee.run(knee.Arguments(**{"name": "no", "largest": 8, option: value}), recipe)
    assert not results.exists() and not Path(recipe.train.run).exists()
