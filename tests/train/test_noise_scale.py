"""The gradient noise scale: what is logged is what float64 makes of the gradients of single samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from dist_train.data.loader import Batch
from dist_train.errors import UseError
from dist_train.models.classifier import Classifier
from dist_train.models.names import VIT_SIZES
from dist_train.place import Place
from dist_train.recipe import check_combination
from dist_train.train.engine import init_process_group
from dist_train.train.noise_scale import FEWEST, WINDOW, NoiseMeter, ratio_of_means, separate
from dist_train.train.setup import build_step
from tests.harness import CLASSES, logged_steps, train, write_shard_set
from tests.train.deepspeed_worker import BATCH, NARROW, loader_of, recipe_of, start
from tests.train.forked_ranks import run_on

STEPS = 3
RATE_0 = ["--optim.lr=0", "--train.noise_every=1"]  # the weights stay as they are, batch after batch
MODELS = {
    "ifa": ["--model.head=ifa"],
    "vilt": ["--model.text_tokens=4"],
    "frozen": ["--model.head=all_layers", "--model.freeze=1"],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", {"train": [11, 8, 5]}, baked=36, text=True)


# ---------------------------------------------------------------------- the estimator
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("trained", [True, False])
def test_it_knows_where_there_is_nothing_to_compare(accumulation: int, trained: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2).requires_grad_(trained))
    assert NoiseMeter(model, 1, 16, accumulation, Place()).sees_nothing == (accumulation == 1 and not trained)


def test_trace_and_square_are_unbiased_over_all_batches_of_a_small_population() -> None:
    rng = np.random.default_rng(3)
    gradients = rng.normal(1.0, 2.0, (5, 3))
    mean = gradients.mean(axis=0)
    # Batches without repetition, as an epoch has them: the covariance of a sample is that with 5 - 1 in it.
    trace = gradients.var(axis=0, ddof=1).sum()
    square = mean @ mean - trace / 5
    found = []
    for batch in combinations(range(5), 4):
        for half in combinations(batch, 2):
            other = [i for i in batch if i not in half]
            small = np.mean([np.square(gradients[list(part)].mean(axis=0)).sum() for part in (half, other)])
            large = np.square(gradients[list(batch)].mean(axis=0)).sum()
            found.append([float(value) for value in separate(torch.tensor(small), torch.tensor(large), 2, 4)])
    assert np.mean(found, axis=0) == pytest.approx([trace, square], rel=1e-9)


def test_the_interval_holds_the_ratio_in_95_of_100_cases_and_has_no_end_where_there_is_no_gradient() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        noise = rng.normal(size=(60, 2)) @ np.array([[1.0, 0.4], [0.0, 0.5]])
        estimate = ratio_of_means(list(5 + 2 * noise[:, 0]), list(0.5 + noise[:, 1]))
        assert estimate.low <= estimate.value <= estimate.high
        inside += estimate.low <= 10 <= estimate.high
    assert 0.93 < inside / 2000 < 0.97
    endless = ratio_of_means(list(5 + rng.normal(size=60)), list(rng.normal(size=60) - 0.02))
    assert endless.high == math.inf
    assert endless.low > 1
    few = ratio_of_means([2.0] * (FEWEST - 1), [1.0] * (FEWEST - 1))
    assert few.value == 2
    assert math.isnan(few.low)


def watch(meter: NoiseMeter, losses: list[Callable[[], Tensor]]) -> None:
    """One step over micro-batches of these losses."""
    for parameter in meter.model.parameters():
        parameter.grad = None
    with meter.watching():
        for loss in losses:
            (loss() / len(losses)).backward()
            meter.micro_batch_done()
        meter.before_update([p.grad for p in meter.model.parameters() if p.grad is not None])
    meter.step_done(None)


def test_it_is_what_a_linear_regression_has_by_its_closed_form() -> None:
    # Of inputs N(0, 1), weights that are off by `off` and noise of deviation s a sample's gradient is
    # x (x . off) - x e: its mean is off, and the mean of its square (d + 2) |off|^2 + d s^2.
    generator = torch.Generator().manual_seed(1)
    size, deviation = 6, 0.7
    model = nn.Linear(size, 1, bias=False)
    off = torch.full((size,), 0.3)
    truth = size + 1 + size * deviation**2 / float(off @ off)
    model.weight.data = off[None].clone()  # the true weights are 0
    meter = NoiseMeter(model, 1, 32, 4, Place())

    def loss_of_eight() -> Tensor:
        inputs = torch.randn(8, size, generator=generator)
        noise = deviation * torch.randn(8, 1, generator=generator)
        return 0.5 * (model(inputs) - noise).square().mean()

    for _ in range(WINDOW):
        watch(meter, [loss_of_eight] * 4)
    figures = meter.read()
    low, high = figures["noise_scale_low"], figures["noise_scale_high"]
    assert low is not None
    assert high is not None
    assert low < truth < high
    assert high / low < 2
    assert "noise_scale_norms" not in figures


def test_of_layer_norms_it_needs_no_second_batch_size() -> None:
    # The bias of a norm moves towards targets N(m, s): its gradient is N(-m, s), one sample's trace is D s^2.
    generator = torch.Generator().manual_seed(2)
    model = nn.LayerNorm(8)
    model.weight.requires_grad_(False)
    mean, deviation = 0.2, 0.9
    inputs = torch.zeros(16, 5, 8)
    meter = NoiseMeter(model, 1, 16, 1, Place())

    def loss_of_sixteen() -> Tensor:
        targets = mean + deviation * torch.randn(16, 1, 8, generator=generator)
        return 0.5 * (model(inputs).mean(dim=1, keepdim=True) - targets).square().sum() / 16

    for _ in range(WINDOW):
        watch(meter, [loss_of_sixteen])
    figures = meter.read()
    low, high = figures["noise_scale_norms_low"], figures["noise_scale_norms_high"]
    assert low is not None
    assert high is not None
    assert low < deviation**2 / mean**2 < high
    assert "noise_scale" not in figures


# ---------------------------------------------------------------------- in training
def record(shards: Path, jobs: dict[str, list[str]], output: Path) -> None:
    """What each rank does: a few steps of every job, with the micro-batches written down."""
    VIT_SIZES["tiny"] = NARROW
    place = init_process_group()
    figures: dict[str, Any] = {}
    for name, options in jobs.items():
        recipe = recipe_of(shards, options)
        model, tokenizer = start(recipe)
        batches = list(islice(loader_of(recipe, place, recipe.train.micro_batch_size, tokenizer), STEPS * 2))
        step = build_step(model, recipe, place, [12, 6, 4, 2])
        assert step.noise is not None
        for number in range(STEPS):
            step(iter(batches[2 * number : 2 * number + 2]), 0.0, number)
        step.noise.read()
        figures[name] = list(step.noise._window)
        step.engine.destroy()
        told = [(b.images, b.labels, b.text_ids, b.text_mask) for b in batches]
        torch.save(told, output / f"{name}-rank{place.rank}.pt")
    if place.rank == 0:
        (output / "figures.json").write_text(json.dumps(figures))


def own_gradient(model: Classifier, sample: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The gradient of one sample's loss, float64."""
    images, labels, *text = sample
    model.zero_grad()
    functional.cross_entropy(model(images.double(), *text), labels).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def reference(folder: Path, name: str, options: list[str], shards: Path, ranks: int) -> list[list[float]]:
    """small, large of all parameters, and of the parameters of layer norms by single samples, for each step."""
    model, _ = start(recipe_of(shards, options))
    model.double()
    norms = {
        f"{path}.{kind}"
        for path, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for kind in ("weight", "bias")
    }
    batches = [torch.load(folder / f"{name}-rank{rank}.pt") for rank in range(ranks)]
    rows = []
    for step in range(STEPS):
        parts, singles = [], []
        for rank in range(ranks):
            for told in batches[rank][2 * step : 2 * step + 2]:
                given = [tensor for tensor in told if tensor is not None]
                own = [own_gradient(model, tuple(t[i : i + 1] for t in given)) for i in range(len(told[1]))]
                parts.append(torch.stack([torch.cat([g.flatten() for g in o.values()]) for o in own]))
                singles.append(torch.stack([torch.cat([g.flatten() for n, g in o.items() if n in norms]) for o in own]))
        small = torch.stack([part.mean(dim=0).square().sum() for part in parts]).mean()
        large = torch.cat(parts).mean(dim=0).square().sum()
        of_norms = torch.cat(singles)
        rows.append(
            [float(v) for v in (small, large, of_norms.square().sum(1).mean(), of_norms.mean(dim=0).square().sum())]
        )
    return rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_squares_are_those_of_float64_at_every_zero_stage(
    shards: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    micro = f"--train.micro_batch_size={BATCH // ranks // 2}"
    jobs = {
        f"{model}-{stage}": [*options, *RATE_0, micro, f"--deepspeed.zero_stage={stage}"]
        for model, options in MODELS.items()
        for stage in range(4)
        if stage in (0, 2) or model == "ifa"
    }
    run_on(ranks, tmp_path, record, shards, jobs, tmp_path)
    figures = json.loads((tmp_path / "figures.json").read_text())
    for name, options in jobs.items():
        expected = reference(tmp_path, name, options, shards, ranks)
        for found, wanted in zip(figures[name], expected, strict=True):
            assert found == pytest.approx(wanted, rel=2e-4), name


def test_measuring_changes_nothing_and_is_logged(shards: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train__micro_batch_size": 6, "model__head": "ifa", "train__epochs": 3}
    for name, every in (("without", 0), ("with", 2)):
        assert train(shards, tmp_path / name, train__noise_every=every, **options) == 0
    plain, measured = (logged_steps(tmp_path / name) for name in ("without", "with"))
    assert [row["loss"] for row in plain] == [row["loss"] for row in measured]
    assert "noise_scale" not in plain[-1]
    assert {"noise_scale", "noise_scale_low", "noise_scale_norms", "noise_scale_norms_high"} <= measured[-1].keys()


def test_with_blocks_that_are_computed_again_only_whole_gradients_are_read(shards: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train__micro_batch_size": 6, "model__checkpoint_blocks": True, "train__epochs": 1}
    assert train(shards, tmp_path / "run", train__noise_every=1, **options) == 0
    row = logged_steps(tmp_path / "run")[-1]
    assert "noise_scale" in row
    assert "noise_scale_norms" not in row


def test_compiled_models_are_measured_by_their_operators_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIT_SIZES, "tiny", NARROW)
    place, rows = init_process_group(), []
    images = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    labels, numbers = torch.arange(4) % CLASSES, torch.arange(4).numpy()
    batches = [Batch(its, labels, torch.ones(4), None, None, numbers) for its in images]
    for compile in ("none", "kernels"):
        options = ["--model.head=ifa", "--optim.lr=0", "--train.noise_every=2", "--train.micro_batch_size=4"]
        recipe = recipe_of(Path(), [*options, f"--model.compile={compile}"])
        model, _ = start(recipe)
        step = build_step(model, recipe, place, [1] * CLASSES)
        torch._dynamo.reset()
        counters["stats"].clear()
        made = []
        for number in range(5):
            step(iter(batches), 0.0, number)
            made.append(counters["stats"]["unique_graphs"])
        assert step.noise is not None
        step.noise.read()
        rows.append(list(step.noise._window))
        # The first step is looked at and not compiled; the hooks of the next measured ones compile nothing anew.
        assert made[0] == 0 and (made[1] > 0) is (compile == "kernels") and len(set(made[1:])) == 1
    assert len(rows[0]) == 3
    assert rows[1] == [pytest.approx(row) for row in rows[0]]


def test_what_it_cannot_look_into_is_refused() -> None:
    with pytest.raises(UseError, match=r"noise_every: deepspeed.precision fp16 scales"):
        check_combination(recipe_of(Path(), ["--train.noise_every=10", "--deepspeed.precision=fp16"]), "cuda")
    with pytest.raises(UseError, match=r"graphs does not go with train.noise_every"):
        check_combination(recipe_of(Path(), ["--train.noise_every=10", "--model.compile=graphs"]), "cuda")
