"""What one training step costs: time, throughput, data wait, memory, FLOPs, MFU and energy of one recipe on one device.

Each point is measured in a process of its own (`step_point.py`), so that its memory is its own. Three arms: `synthetic`
trains on one batch that stays on the device (the model alone), `loader` only loads, `end_to_end` does both as a run
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from benchmarks.arguments import check_words, words
from benchmarks.benchmark import Benchmark
from benchmarks.charts import Chart
from benchmarks.points import ChildEnded, run_point
from benchmarks.result import write_result
from benchmarks.speed.batch_charts import over_batches
from benchmarks.tables import Document, Row, by, describe_row, figures, rate
from dist_train.config import Recipe
from dist_train.data.plan import micro_batch_of
from dist_train.errors import UseError, WorkError
from dist_train.output import say
from dist_train.ranges import AT_LEAST_1, NOT_NEGATIVE

Arm = Literal["synthetic", "loader", "end_to_end"]
ARMS: tuple[Arm, ...] = ("synthetic", "loader", "end_to_end")
PAPER_CLASSES, PAPER_SAMPLES = 3263, 322_947
"""Of DAF, and of an epoch of it: what is assumed where there is no shard set."""
SYNTHETIC_VOCABULARY = 30522  # of bert-base-uncased


@dataclass(frozen=True)
class Arguments:
    """Time, throughput, data wait, memory, FLOPs and MFU of one point: a recipe on one device."""

    name: str
    """of the result: benchmarks/results/step/NAME.json"""
    arms: str = "synthetic"
    """of synthetic,loader,end_to_end"""
    warmup: Annotated[int, NOT_NEGATIVE] = 5
    """steps before those that are measured"""
    steps: Annotated[int, AT_LEAST_1] = 30
    """steps measured"""


def run(arguments: Arguments, recipe: Recipe) -> Path:
    """Measure the arms, a process each, say a line of each and write the result."""
    arms = words(arguments.arms)
    check_words("--arms", "arm", arms, ARMS)
    rows = []
    for arm in arms:
        rows.append(measure(recipe, arm, arguments.warmup, arguments.steps))
        named = f"{arm}, {recipe.model.backbone} {recipe.model.head} batch {recipe.train.batch_size}"
        say(describe_row(rows[-1], named))
    parameters = {"recipe": asdict(recipe), "warmup": arguments.warmup, "steps": arguments.steps}
    return write_result("step", arguments.name, parameters, rows)


def measure(
    recipe: Recipe,
    arm: str,
    warmup: int,
    steps: int,
    environment: Mapping[str, str] | None = None,
    memory_limit: int = 0,
) -> Row:
    """One row, from a process of its own. Running out of memory is a result; raises WorkError for other failures.

    environment: variables to set beside this process's. memory_limit: bytes that the process may take on its device, 0
    for what there is.
    """
    point = {"recipe": asdict(recipe), "arm": arm, "warmup": warmup, "steps": steps, "memory_limit": memory_limit}
    try:
        row = run_point("benchmarks.speed.step_point:measure", point, environment)
    except ChildEnded as ended:
        # -9 is what Linux does to a process that takes more memory than there is.
        if ended.status not in (-9, 137) and not (ended.status < 0 and "bad_alloc" in ended.said):
            raise WorkError(f"{arm}: {ended}") from None
        row = {"out_of_memory": True}
    except (UseError, WorkError) as error:
        raise (UseError if isinstance(error, UseError) else WorkError)(f"{arm}: {error}") from None
    return describe(recipe, arm) | row


def describe(recipe: Recipe, arm: str) -> Row:
    """What tells one point from another."""
    from dist_train.train.settings import precision_of

    return {
        "arm": arm,
        "backbone": recipe.model.backbone,
        "head": recipe.model.head,
        "text_tokens": recipe.model.text_tokens,
        "image_size": recipe.data.image_size,
        "batch_size": recipe.train.batch_size,
        "micro_batch": micro_batch_of(recipe.train.batch_size, 1, recipe.train.micro_batch_size),
        "precision": precision_of(recipe.deepspeed),
        "zero_stage": recipe.deepspeed.zero_stage,
        "compile": recipe.model.compile,
    }


def headline(document: Document) -> str:
    """Images a second of each arm."""
    rates = {arm: figures(rows, "images_per_s") for arm, rows in by(document["rows"], "arm").items()}
    return ", ".join(f"{arm.replace('_', ' ')} {rate(found)} images/s" for arm, found in rates.items() if found)


def charts(document: Document) -> list[Chart]:
    """Throughput and memory over the batch size."""
    return over_batches(document["rows"], "memory_mb")


COLUMNS = [
    ("arm", "arm", ""),
    ("backbone", "backbone", ""),
    ("head", "head", ""),
    ("image_size", "px", "d"),
    ("batch_size", "batch", "d"),
    ("micro_batch", "micro-batch", "d"),
    ("precision", "precision", ""),
    ("compile", "compiled", ""),
    ("step_ms", "step ms", ",.1f"),
    ("step_ms_p95", "p95", ",.1f"),
    ("images_per_s", "images/s", ",.1f"),
    ("data_wait_share", "data wait", ".2%"),
    ("first_batch_s", "first batch s", ".2f"),
    ("memory_mb", "peak MB", ",.0f"),
    ("device_mb", "whole GPU MB", ",.0f"),
    ("dali_mb", "DALI's MB", ",.0f"),
    ("saved_activations_mb", "saved MB", ",.0f"),
    ("mfu_of_matmul", "MFU of matmul", ".2f"),
]
BENCHMARK = Benchmark(
    "step", "What a training step costs", Arguments, run, COLUMNS, headline, charts, takes_recipe=True
)
