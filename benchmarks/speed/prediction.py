"""The memory of a training step as it is predicted, beside what the step really takes.

On a CPU each recipe has a process of its own, and two measures: what torch's allocator has handed out, which is what is
predicted, and what the process has in its memory beyond what it had before it built the model, which adds what malloc
and the kernels' libraries keep. Another process has the second measure where malloc gives back what is freed. Of GPUs
the committed rows of `gpu` are predicted, on any machine.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil

from benchmarks.benchmark import Benchmark
from benchmarks.points import run_point
from benchmarks.result import RESULTS, write_result
from benchmarks.tables import Document, describe_row, figures
from dist_train.config import recipe_from_dict
from dist_train.output import say
from dist_train.parse import parse_recipe
from dist_train.ranges import NOT_NEGATIVE

CLASSES, VOCABULARY = 3263, 30522  # of DAF and of bert-base-uncased, which `gpu` has too
SETTINGS = (
    "--model.backbone vit_tiny_patch16 --train.batch_size 8",
    "--model.backbone vit_tiny_patch16 --train.batch_size 64",
    "--model.backbone vit_tiny_patch16 --train.batch_size 64 --model.checkpoint_blocks true",
    "--model.backbone vit_tiny_patch16 --train.batch_size 32 --model.head ifa --model.text_tokens 16",
    "--model.backbone vit_small_patch16 --train.batch_size 32",
    "--model.backbone vit_small_patch16 --train.batch_size 32 --train.micro_batch_size 8 --optim.name adamw",
    "--model.backbone vit_small_patch16 --train.batch_size 16 --model.lora 8",
    "--model.backbone vit_small_patch16 --train.batch_size 16 --deepspeed.precision bf16_autocast",
    "--model.backbone resnet18 --train.batch_size 16",
)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""With it malloc gives whatever is larger than so many bytes back to the system when it is freed, and takes longer."""


@dataclass(frozen=True)
class Arguments:
    """The memory of a training step, predicted without making it, beside what it takes."""

    name: str
    """of the result: benchmarks/results/memory/NAME.json"""
    settings: Annotated[int, NOT_NEGATIVE] = len(SETTINGS)
    """how many of the recipes to measure here"""
    here_alone: bool = False
    """do not predict the committed rows of GPUs"""


def run(arguments: Arguments) -> Path:
    """Measure and predict, say a line of each and write the result."""
    rows: list[dict[str, Any]] = []
    for words in SETTINGS[: arguments.settings]:
        recipe, _ = parse_recipe(words.split())
        point = {"recipe": asdict(recipe)}
        row = run_point("benchmarks.speed.prediction:measure", point)
        given_back = run_point("benchmarks.speed.prediction:measure", point, GIVES_BACK)
        row |= {f"{key}_given_back": given_back[key] for key in ("resident_mb", "of_resident")}
        rows.append(
            {"what": words.replace("--model.", "").replace("--train.", "").replace("--", ""), "on": "cpu"} | row
        )
        say(describe_row(rows[-1], rows[-1]["what"]))
    for row in () if arguments.here_alone else of_gpus():
        rows.append(row)
        say(describe_row(row, f"{row['on']}, {row['what']}"))
    return write_result("memory", arguments.name, {"classes": CLASSES}, rows)


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """The row of a recipe, in a process of its own."""
    from benchmarks.speed.memory import peak_bytes
    from benchmarks.speed.own_step import OwnStep, synthetic_batch
    from dist_train.data.loader import Batch
    from dist_train.train.engine import init_process_group
    from dist_train.train.memory import predict_step
    from dist_train.train.meters import forget_peak_memory, peak_resident_mb

    recipe, place = recipe_from_dict(point["recipe"]), init_process_group()
    vocabulary = VOCABULARY if recipe.model.text_tokens else 0
    predicted = predict_step(recipe, CLASSES, vocabulary)
    gc.collect()
    own: OwnStep

    def batches() -> Iterator[Batch]:
        while True:
            yield synthetic_batch(recipe, predicted.micro_batch, CLASSES, own.device)

    before = psutil.Process().memory_info().rss / 1e6
    with closing(OwnStep(recipe, place, CLASSES, vocabulary)) as own:
        own(batches())  # which also loads the kernels' libraries
        forget_peak_memory(own.device)
        own(batches())
        resident = peak_resident_mb() - before
        state = own.engine.basic_optimizer.state.values()
        held = [*own.engine.module.parameters(), *own.engine.module.buffers()]
        held += [value for values in state for value in values.values() if hasattr(value, "nbytes")]
        allocated = (sum(tensor.nbytes for tensor in held) + peak_bytes(lambda: own(batches()), own.device)) / 1e6
    return {
        "batch_size": recipe.train.batch_size,
        "micro_batch": predicted.micro_batch,
        "predicted_mb": predicted.peak_mb,
        "allocated_mb": round(allocated, 1),
        "resident_mb": round(resident, 1),
        "of_allocated": round(predicted.peak_mb / allocated, 4),
        "of_resident": round(predicted.peak_mb / resident, 4),
    }


def of_gpus() -> Iterator[dict[str, Any]]:
    """A row for each measured point of `gpu`, but for what is compiled, and what had a loader's batches beside it."""
    from dist_train.train.memory import StepMemory, predict_step

    predicted: dict[str, StepMemory] = {}  # of several GPUs at once

    for path in sorted((RESULTS / "gpu").glob("*.json")):
        for row in json.loads(path.read_bytes())["rows"]:
            alone = row.get("arm") == "synthetic" and row.get("compile") == "none" and "dali_mb" not in row
            if "memory_mb" not in row or not alone:
                continue
            keys = ("backbone", "head", "text_tokens"), ("batch_size",), ("precision", "zero_stage")
            sections = zip(("model", "train", "deepspeed"), keys, strict=True)
            words = [f"--{section}.{key}={row[key]}" for section, names in sections for key in names]
            recipe, _ = parse_recipe([*words, f"--data.image_size={row['image_size']}"])
            if row["what"] not in predicted:
                vocabulary = VOCABULARY if row["text_tokens"] else 0
                predicted[row["what"]] = predict_step(recipe, CLASSES, vocabulary, on_gpu=True)
            step = predicted[row["what"]]
            yield {
                "what": row["what"].removeprefix("step: "),
                "on": path.stem,
                "batch_size": row["batch_size"],
                "micro_batch": step.micro_batch,
                "predicted_mb": step.peak_mb,
                "allocated_mb": row["memory_mb"],
                "of_allocated": round(step.peak_mb / row["memory_mb"], 4),
            }


def headline(document: Document) -> str:
    """The largest misses."""
    said = []
    for where, key, what in (
        ("cpu", "of_allocated", "allocated"),
        ("cpu", "of_resident", "resident"),
        ("cpu", "of_resident_given_back", "resident where malloc gives back what is freed"),
        ("nvidia", "of_allocated", "allocated"),
    ):
        found = figures([row for row in document["rows"] if str(row.get("on")).startswith(where)], key)
        if found:
            worst = 100 * max(abs(ratio - 1) for ratio in found)
            said.append(f"{where} within {worst:.1f} % of what is {what} ({len(found)} settings)")
    return "predicted " + ", ".join(said) if said else ""


COLUMNS = [
    ("what", "recipe", ""),
    ("on", "on", ""),
    ("micro_batch", "micro-batch", "d"),
    ("predicted_mb", "predicted MB", ",.0f"),
    ("allocated_mb", "allocated MB", ",.0f"),
    ("of_allocated", "ratio", ".3f"),
    ("resident_mb", "resident MB", ",.0f"),
    ("of_resident", "ratio", ".3f"),
    ("resident_mb_given_back", "where malloc gives back, MB", ",.0f"),
    ("of_resident_given_back", "ratio", ".3f"),
]
BENCHMARK = Benchmark("memory", "The memory of a step, predicted and measured", Arguments, run, COLUMNS, headline)
