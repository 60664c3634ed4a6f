"""What measuring the gradient noise scale costs a step, and whether what is measured is true.

A model is trained a little by a recipe, then its weights are kept as they are. Over a fixed population of training
samples float64 gives the covariance of their gradients and the mean, hence the noise scale; the trainer's estimate from
random batches of them stands beside it. Measured in a process of its own for each ZeRO stage and accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import islice, product, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from benchmarks.arguments import check_words, numbers, words
from benchmarks.benchmark import Benchmark
from benchmarks.points import run_point
from benchmarks.result import write_result
from benchmarks.tables import Document, Row, describe_row, figures, having, span
from dist_train.config import Recipe, ZeroStage, recipe_from_dict, recipe_to_dict
from dist_train.errors import UseError
from dist_train.output import say

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.data.loader import Batch
    from dist_train.models.classifier import Classifier
    from dist_train.train.step import TrainStep

TURNS, WARM_UP, STEPS = 10, 1, 5  # of the timing
EVERY = 10  # the share of a run's time is told for this train.noise_every


@dataclass(frozen=True)
class Arguments:
    """Time of a step that measures the gradient noise scale beside one that does not, and the estimate beside float64
    over the same samples."""

    name: str
    """of the result: benchmarks/results/noise/NAME.json"""
    stages: str = "0,1,2,3"
    """ZeRO stages"""
    accumulations: str = "1,4"
    """micro-batches of a step"""
    samples: int = 512
    """the population, from the beginning of the recipe's first epoch"""
    warm: int = 50
    """training steps before the weights are kept"""
    steps: int = 100
    """measured steps that the estimate is made of"""


def run(arguments: Arguments, recipe: Recipe) -> Path:
    """Measure every stage and accumulation, say each row and write the result."""
    rows: list[Row] = []
    batch = recipe.train.batch_size
    stages, accumulations = words(arguments.stages), numbers("--accumulations", arguments.accumulations)
    check_words("--stages", "ZeRO stage", stages, [str(stage) for stage in get_args(ZeroStage)])
    if arguments.samples < batch or arguments.samples % batch:
        raise UseError(f"--samples {arguments.samples}: must be a multiple of train.batch_size {batch}")
    if wrong := [accumulation for accumulation in accumulations if batch % accumulation]:
        raise UseError(f"--accumulations {wrong[0]}: must divide train.batch_size {batch}")
    for stage, accumulation in product(map(int, stages), accumulations):
        asked = replace(
            recipe,
            train=replace(recipe.train, micro_batch_size=batch // accumulation, noise_every=1),
            deepspeed=replace(recipe.deepspeed, zero_stage=cast(ZeroStage, stage)),
        )
        point = {"recipe": recipe_to_dict(asked), "samples": arguments.samples}
        point |= {"warm": arguments.warm, "steps": arguments.steps}
        row = {"zero_stage": stage, "accumulation": accumulation, "micro_batch": batch // accumulation}
        rows.append(row | run_point("benchmarks.claims.noise:measure", point))
        say(describe_row(rows[-1], f"ZeRO {stage}, accumulation {accumulation}"))
    parameters = {"recipe": asdict(recipe), **asdict(arguments), "every": EVERY}
    return write_result("noise", arguments.name, parameters, rows)


# ---------------------------------------------------------------- in the child
def measure(point: dict[str, Any]) -> Row:
    """The row of one stage and accumulation."""
    import torch

    from benchmarks.speed.timing import median_ms, timed_in_turns
    from dist_train.data.manifest import read_manifest
    from dist_train.train.engine import init_process_group
    from dist_train.train.inputs import begin_tokenizer, train_loader
    from dist_train.train.schedule import learning_rate
    from dist_train.train.setup import build_step, initial_model, without_auto

    place = init_process_group()
    recipe = without_auto(recipe_from_dict(point["recipe"]), torch.device("cpu"), 1)
    manifest = read_manifest(recipe.data.shards)
    tokenizer = begin_tokenizer(recipe, manifest, place, None)
    micro, batch = point["recipe"]["train"]["micro_batch_size"], recipe.train.batch_size
    population = list(islice(train_loader(recipe, manifest, place, tokenizer), point["samples"] // micro))
    model, _ = initial_model(recipe, manifest.class_names, tokenizer.vocab_size if tokenizer else 0)
    step = build_step(model, recipe, place, [info.count for info in manifest.classes])
    assert step.noise is not None
    meter, step.noise = step.noise, None
    train_batches = iter(train_loader(recipe, manifest, place, tokenizer))
    for number in range(point["warm"]):
        rate = learning_rate(recipe.optim, batch, number, point["warm"] + 1, manifest.split("train").samples)
        step(train_batches, rate, number)

    same = population[: batch // micro]

    def turn(noise: Any) -> Any:
        def one(number: int) -> None:
            step.noise = noise
            step(iter(same), 0.0, 0)

        return one

    times = timed_in_turns({"plain": turn(None), "measured": turn(meter)}, TURNS, WARM_UP, STEPS, step.engine.device)
    plain, measured = median_ms(times["plain"]), median_ms(times["measured"])
    row: Row = {"plain_ms": plain, "measured_ms": measured, "measured_ratio": round(measured / plain, 4)}
    row["every_10_percent"] = round(100 * (measured / plain - 1) / EVERY, 3)
    if recipe.deepspeed.zero_stage == 0 and not tokenizer:
        step.noise = replace(meter)  # with an empty window
        row |= agreement(step, model, population, point["steps"])
    return row


def agreement(step: TrainStep, model: Classifier, population: list[Batch], steps: int) -> Row:
    """The estimate of `steps` steps on random batches of the population, and what float64 makes of all of it."""
    import torch

    images = torch.cat([batch.images for batch in population])
    labels = torch.cat([batch.labels for batch in population])
    size = len(population[0].labels)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Batch]:
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(size):
                yield replace(population[0], images=images[chosen], labels=labels[chosen])

    drawn = batches()
    for _ in repeat(None, steps):
        step(drawn, 0.0, 0)
    found = step.noise.read() if step.noise is not None else {}
    row: Row = {name: None if value is None else round(value, 3) for name, value in found.items()}
    for kind, value in true_scales(model, images, labels).items():
        if kind in row:
            row[f"true_{kind}"] = round(value, 3)
    return row


def true_scales(model: Classifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The noise scales over these samples by float64, of all parameters and of the layer norms' alone.

    tr(S) is the trace of the sample covariance. |G|^2 is the square of the mean less tr(S) / N, as batches are drawn
    from these N samples without repetition (so that the batch of all N has no noise in it that they could show).
    """
    import torch
    from torch.nn import LayerNorm, functional

    exact = deepcopy(model).double()
    norms = {id(p) for m in exact.modules() if isinstance(m, LayerNorm) for p in m.parameters()}
    trained = [p for p in exact.parameters() if p.requires_grad]
    kinds = {"noise_scale": trained, "noise_scale_norms": [p for p in trained if id(p) in norms]}
    sums = {id(p): torch.zeros_like(p) for p in trained}
    squares = dict.fromkeys(kinds, 0.0)
    count = len(labels)
    for image, label in zip(images, labels, strict=True):
        exact.zero_grad()
        functional.cross_entropy(exact(image[None].double()), label[None]).backward()
        gradients = {id(p): p.grad for p in trained if p.grad is not None}
        for key, gradient in gradients.items():
            sums[key] += gradient
        for kind, parameters in kinds.items():
            squares[kind] += sum(float(gradients[id(p)].square().sum()) for p in parameters if id(p) in gradients)
    scales = {}
    for kind, parameters in kinds.items():
        mean = sum(float((sums[id(p)] / count).square().sum()) for p in parameters)
        trace = (squares[kind] - count * mean) / (count - 1)
        scales[kind] = trace / (mean - trace / count)
    return scales


# ---------------------------------------------------------------- what the report shows
def headline(document: Document) -> str:
    """What it costs at every tenth step, and the estimates beside float64."""
    rows = document["rows"]
    costs = figures(rows, "every_10_percent")
    if not costs:
        return ""
    said = f"Measured at every tenth step it costs {span(costs, '.2f')} % of the time"
    true = having(rows, "noise_scale", "true_noise_scale")
    if true:
        said += "; " + ", ".join(
            f"{row['noise_scale']:,.0f} where float64 has {row['true_noise_scale']:,.0f}" for row in true
        )
    return said


COLUMNS = [
    ("zero_stage", "ZeRO", "d"),
    ("accumulation", "micro-batches a step", "d"),
    ("micro_batch", "micro-batch", "d"),
    ("plain_ms", "step ms", ",.1f"),
    ("measured_ms", "measured step ms", ",.1f"),
    ("measured_ratio", "ratio", ".3f"),
    ("every_10_percent", "at every 10th step, %", ".2f"),
    ("noise_scale", "noise scale", ",.1f"),
    ("noise_scale_low", "low", ",.1f"),
    ("noise_scale_high", "high", ",.1f"),
    ("true_noise_scale", "by float64", ",.1f"),
    ("noise_scale_norms", "of norms", ",.1f"),
    ("noise_scale_norms_low", "low", ",.1f"),
    ("noise_scale_norms_high", "high", ",.1f"),
    ("true_noise_scale_norms", "by float64", ",.1f"),
]
BENCHMARK = Benchmark(
    "noise",
    "What the gradient noise scale costs, and whether it is true",
    Arguments,
    run,
    COLUMNS,
    headline,
    takes_recipe=True,
)
