"""A GPU measured in one command, `benchmarks/gpu_suite.sh`: is it right, how fast is it, does the data keep up.

A list of points, the most important first, each in a process of its own (`benchmarks/gpu_points.py`). The result,
`benchmarks/results/gpu/NAME.json`, is written anew after every point, so a run that is cut off at any moment leaves all
rows that were finished, and the same command goes on after them (on the same machine and commit). A point for which the
time left may not do is skipped, and one that fails becomes a row with "error": neither ends the suite.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import result
from benchmarks.result import environment_of_one_process
from dist_train.config import DataConfig, DeepSpeedConfig, ModelConfig, Recipe, TrainConfig
from dist_train.errors import UseError, run_command

Row = dict[str, Any]

BUDGET_S = 500.0
POINT_LIMIT_S = 150.0  # a point that takes longer hangs
CHECKS = ("loss", "pixels", "training")
MFU_TARGET, DATA_WAIT_TARGET, IFA_TIME_TARGET, IFA_GB_TARGET = 0.55, 0.01, 0.01, 0.05
SMOKE_RESULTS = Path("data/gpu-suite-smoke/results")
# What a row's name says already, for the line on the terminal.
_NAMED = ("what", "arm", "backbone", "head", "text_tokens", "image_size", "batch_size", "micro_batch", "precision")


@dataclass(frozen=True)
class Scale:
    """How large the points are. batches: the largest first. loader_steps: of the loader alone. pairs: turns of IFA
    and CLS."""

    large: str
    base: str
    image_size: int
    crop_margin: int
    batches: tuple[int, ...]
    text_tokens: int
    warmup: int
    steps: int
    loader_steps: int
    pairs: int


FULL = Scale(
    large="vit_large_patch16",
    base="vit_base_patch16",
    image_size=128,
    crop_margin=32,
    batches=(256, 128, 64, 32, 16),
    text_tokens=32,
    warmup=5,
    steps=30,
    loader_steps=100,
    pairs=40,
)
SMOKE = Scale(
    large="vit_tiny_patch8",
    base="vit_tiny_patch16",
    image_size=32,
    crop_margin=8,
    batches=(8, 4),
    text_tokens=8,
    warmup=1,
    steps=2,
    loader_steps=2,
    pairs=2,
)


@dataclass(frozen=True)
class Point:
    """One row. what: its key. kind, arguments: what `benchmarks.gpu_points` measures. similar: points of one such name
    take about as long. smoke: whether the smoke run has it too."""

    what: str
    kind: str
    arguments: dict[str, Any]
    similar: str = ""
    needs_gpu: bool = False
    smoke: bool = False

    @property
    def takes_as(self) -> str:
        """The name that points which take about as long share."""
        return self.similar or self.kind


def main(arguments: list[str] | None = None) -> int:
    """Run the suite. Returns the exit status: 1 if a correctness point failed, 2 for wrong use, else 0."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="A GPU measured in one command: use benchmarks/gpu_suite.sh."
    )
    parser.add_argument("--shards", type=Path, required=True, metavar="SET", help="images baked to the training square")
    parser.add_argument("--smoke", action="store_true", help="small models and a few steps, on the CPU if need be")
    parser.add_argument("--name", help="of the result: benchmarks/results/gpu/NAME.json (default: the device's name)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="S", help="seconds to finish within (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help=f"in place of benchmarks/results (smoke: {SMOKE_RESULTS})"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options, begin))


def _run(options: argparse.Namespace, begin: float) -> int:
    gpu = torch.cuda.is_available()
    if not gpu and not options.smoke:
        raise UseError("there is no GPU here; --smoke runs the suite with small models on the CPU")
    if options.results or options.smoke:
        result.RESULTS = options.results or SMOKE_RESULTS
    name = options.name or re.sub(r"\W+", "-", torch.cuda.get_device_name() if gpu else "cpu").strip("-").lower()
    scale = SMOKE if options.smoke else FULL
    points = [point for point in plan(scale, str(options.shards)) if point.smoke or not options.smoke]
    parameters = asdict(scale) | {"smoke": options.smoke, "shards": str(options.shards)}
    command = shlex.join(["benchmarks/gpu_suite.sh", *(["--smoke"] if options.smoke else []), "--name", name])

    def write(rows: list[Row]) -> None:
        result.write_result("gpu", name, parameters, rows, {"command": command, "targets": targets(rows, scale)})

    rows = run_points(
        points, result.finished_rows("gpu", name, parameters), begin + options.budget, gpu, measure_in_process, write
    )
    for target in targets(rows, scale):
        print(describe_row(target))
    return int(any(row.get("met") is False or "error" in row for row in rows if row["what"].startswith("check: ")))


def plan(scale: Scale, shards: str) -> list[Point]:
    """All points in order: correctness first, then what the targets and the most interesting comparisons need."""
    large, base, first = scale.large, scale.base, scale.batches[0]
    points = [
        Point("check: loss and gradient against float64 on the CPU", "loss", {}, smoke=True),
        Point(
            "check: pixels of the device's pipeline against the CPU's",
            "pixels",
            {"shards": shards, "batch": first, "image_size": scale.image_size, "crop_margin": scale.crop_margin},
            smoke=True,
        ),
        Point(
            "check: fp16 with ZeRO 1 trains",
            "training",
            {"precision": "fp16", "zero_stage": 1, "steps": 3},
            needs_gpu=True,
            smoke=True,
        ),
        synthetic(scale, large, first, smoke=True),
        synthetic(scale, large, first, compile=True, needs_gpu=True, smoke=True),
        ifa_beside_cls(scale, base, first, smoke=True),
        with_data(scale, shards, "end_to_end", large, first, smoke=True),
        with_data(scale, shards, "loader", "gpu", first, needs_gpu=True, smoke=True),
        with_data(scale, shards, "loader", "cpu", first, smoke=True),
        synthetic(scale, base, first),
        with_data(scale, shards, "end_to_end", base, first),
        synthetic(scale, base, first, text_tokens=scale.text_tokens, smoke=True),
        synthetic(scale, large, first, zero_stage=1),
        synthetic(scale, large, first, head="ifa"),
        synthetic(scale, base, first, head="ifa"),
        ifa_beside_cls(scale, large, first),
    ]
    # The smallest first: from the two ends of the scale one can guess what lies between.
    for batch in sorted(scale.batches[1:]):
        points += [synthetic(scale, large, batch), synthetic(scale, base, batch, smoke=True)]
        if batch == 64:
            points.append(ifa_beside_cls(scale, base, batch))
    return points


def synthetic(
    scale: Scale,
    backbone: str,
    batch: int,
    *,
    head: str = "cls",
    text_tokens: int = 0,
    zero_stage: int = 0,
    compile: bool = False,
    needs_gpu: bool = False,
    smoke: bool = False,
) -> Point:
    """The steps of a model in bf16 on one batch that stays on the device."""
    model = ModelConfig(backbone=backbone, head=head, text_tokens=text_tokens, compile=compile)
    recipe = bf16_recipe(scale, model, batch)
    recipe = replace(recipe, deepspeed=replace(recipe.deepspeed, zero_stage=zero_stage))
    what = f"step: {backbone} {head} batch {batch}"
    what += f", {text_tokens} text tokens" if text_tokens else ""
    what += f", ZeRO {zero_stage}" if zero_stage else ""
    what += ", compiled" if compile else ""
    arguments = {"recipe": asdict(recipe), "warmup": scale.warmup, "steps": scale.steps}
    # Compiling takes far longer than the steps.
    return Point(what, "synthetic", arguments, "compiled" if compile else "", needs_gpu, smoke)


def with_data(
    scale: Scale, shards: str, kind: str, which: str, batch: int, *, needs_gpu: bool = False, smoke: bool = False
) -> Point:
    """The training loader alone (which: the device that decodes), or the steps of a model (which: its backbone) on what
    it loads."""
    loader = kind == "loader"
    recipe = bf16_recipe(scale, ModelConfig(backbone=scale.base if loader else which), batch)
    recipe = replace(recipe, data=replace(recipe.data, shards=shards, device=which if loader else "auto"))
    what = f"loader: on the {which.upper()}, batch {batch}" if loader else f"end to end: {which} cls batch {batch}"
    steps = scale.loader_steps if loader else scale.steps
    arguments = {"recipe": asdict(recipe), "warmup": scale.warmup, "steps": steps}
    return Point(what, kind, arguments, needs_gpu=needs_gpu, smoke=smoke)


def ifa_beside_cls(scale: Scale, backbone: str, batch: int, *, smoke: bool = False) -> Point:
    """What the IFA head costs over the CLS head."""
    arguments = {
        "backbone": backbone,
        "text_tokens": 0,
        "batch": batch,
        "size": scale.image_size,
        "classes": 3263,  # DAF's
        "precision": "bf16",
        "pairs": scale.pairs,
    }
    return Point(f"IFA beside CLS: {backbone} batch {batch}", "pairs", arguments, smoke=smoke)


def bf16_recipe(scale: Scale, model: ModelConfig, batch: int) -> Recipe:
    """The paper's image size and optimizer, one micro-batch a step, autocast."""
    return Recipe(
        data=DataConfig(image_size=scale.image_size, crop_margin=scale.crop_margin),
        model=model,
        train=TrainConfig(batch_size=batch),
        deepspeed=DeepSpeedConfig(precision="bf16"),
    )


def run_points(
    points: list[Point],
    kept: Iterable[Row],
    end: float,
    gpu: bool,
    measure: Callable[[Point, float], Row],
    write: Callable[[list[Row]], None],
) -> list[Row]:
    """The rows of all points, those in `kept` that hold figures as they are; `write` gets all there are after each.

    end: by time.monotonic(), when to be done. measure(point, limit) returns figures, or raises TimeoutError after
    `limit` seconds.
    """
    finished = {row["what"]: row for row in kept if "error" not in row and "skipped" not in row}
    rows = {point.what: finished[point.what] for point in points if point.what in finished}
    longest: dict[str, float] = {}
    for point in points:
        if point.what in rows:
            row = rows[point.what]
            print(f"{point.what}: kept from before")
        else:
            left = end - time.monotonic()
            expected = longest.get(point.takes_as, max(longest.values(), default=0.0))
            row = {"what": point.what} | _row(point, left, expected, gpu, measure)
            rows[point.what] = row
            write([rows[done.what] for done in points if done.what in rows])
            print(describe_row(row), flush=True)
        if "seconds" in row:
            longest[point.takes_as] = max(row["seconds"], longest.get(point.takes_as, 0.0))
    return [rows[point.what] for point in points]


def _row(point: Point, left: float, expected: float, gpu: bool, measure: Callable[[Point, float], Row]) -> Row:
    if point.needs_gpu and not gpu:
        return {"skipped": "needs a GPU"}
    if left <= expected:
        return {"skipped": "out of time"}
    begin = time.monotonic()
    try:
        figures = measure(point, min(left, POINT_LIMIT_S))
    except TimeoutError:
        figures = {"error": f"no result after {POINT_LIMIT_S:g} s"} if left > POINT_LIMIT_S else None
    return {"skipped": "out of time"} if figures is None else figures | {"seconds": round(time.monotonic() - begin, 2)}


def measure_in_process(point: Point, limit: float) -> Row:
    """Figures of a point from a process of its own, or {"error": one line}. Raises TimeoutError after `limit` s."""
    command = [sys.executable, "-m", "benchmarks.gpu_points", json.dumps({"kind": point.kind} | point.arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment_of_one_process(), timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and answers:
        return json.loads(answers[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    print("\n".join(said[-30:]), file=sys.stderr, flush=True)
    # Libraries may have more to say at the exit of a process than its own last word.
    error = next((line.removeprefix("error: ") for line in reversed(said) if line.startswith("error: ")), "")
    if done.returncode < 0:
        error = f"ended by signal {-done.returncode}" + (f": {said[-1].strip()}" if said else "")
    return {"error": error or (said[-1].strip() if said else f"exit status {done.returncode} and no message")}


def targets(rows: list[Row], scale: Scale) -> list[Row]:
    """What is aimed at and whether it is met, from the rows there are; value and met are None where none is there.

    MFU is that of the best variant of the largest model and batch; the others are the worst of all models.
    """
    batch = scale.batches[0]
    large = [row for row in rows if row.get("arm") == "synthetic" and row["backbone"] == scale.large]
    mfu = [row["mfu_of_matmul"] for row in large if row["batch_size"] == batch and "mfu_of_matmul" in row]
    waits = [row["data_wait_share"] for row in rows if row.get("arm") == "end_to_end" and "data_wait_share" in row]
    pairs = [row for row in rows if "time_over_cls" in row and row["batch_size"] == batch]
    time_over = [round(row["time_over_cls"] - 1, 4) for row in pairs]
    memory_over = [round(row["peak_over_cls_mb"] / 1000, 6) for row in pairs]
    return [
        _target(f"MFU of the matrix product, {scale.large} batch {batch}", max(mfu, default=None), MFU_TARGET, True),
        _target("share of a step that waits for data", max(waits, default=None), DATA_WAIT_TARGET),
        _target(f"IFA over CLS, batch {batch}, share of time", max(time_over, default=None), IFA_TIME_TARGET),
        _target(f"IFA over CLS, batch {batch}, GB", max(memory_over, default=None), IFA_GB_TARGET),
    ]


def _target(what: str, value: float | None, limit: float, at_least: bool = False) -> Row:
    met = None if value is None else value >= limit if at_least else value <= limit
    bound = "at least" if at_least else "at most"
    return {"what": f"target: {what}", "value": value, "bound": bound, "limit": limit, "met": met}


def describe_row(row: Row) -> str:
    """One line: what was measured, and its figures."""
    figures = [f"{key} {value}" for key, value in row.items() if key not in _NAMED and value is not None]
    return f"{row['what']}: {', '.join(figures)}"


if __name__ == "__main__":
    sys.exit(main())
