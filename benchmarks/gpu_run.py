"""A small training through the command line, as a user starts one: stopped, gone on with, evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.points import environment_of_one_process
from dist_train.data.manifest import read_manifest
from dist_train.errors import WorkError

Row = dict[str, Any]

LOG_EVERY = 5  # steps
LIMITS = {"cuda": 0.02, "cpu": 1e-6}
"""Largest relative difference of the test loss of a run that was stopped from that of one that was not. On a GPU the
first step of a process is not compiled, and bf16 rounds otherwise there."""


def measure_run(point: Row) -> Row:
    """One epoch in a process that is stopped half-way and one that goes on, beside an epoch in one piece.

    `met`: both end with the same test loss (within `limit`, relative), and `dist-train evaluate` finds the accuracy
    that the run has written down. images_per_s is the stopped run's, beside which the suite's checks ran;
    first_batch_s what its first five steps waited for data. point: shards, backbone, image_size, crop_margin, batch.
    """
    begin = time.perf_counter()
    steps = read_manifest(point["shards"]).split("train").samples // point["batch"]
    with tempfile.TemporaryDirectory(prefix="gpu-suite-run-") as folder:
        stopped, whole = Path(folder) / "stopped", Path(folder) / "whole"
        finish(start([*train(point, stopped), "--train.stop_after_steps", str(max(1, steps // 2))]))
        logged = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
        # Side by side: nothing of them is timed.
        both = [start([*train(point, stopped), "--resume", "auto"]), start(train(point, whole))]
        for process in both:
            finish(process)
        said = finish(start(["evaluate", str(stopped), "--checkpoint", "last"]))
        evaluated = json.loads(said[said.index("{\n") :])  # libraries have their say before
        resumed, other = (json.loads((run / "summary.json").read_bytes()) for run in (stopped, whole))
    rates = [line["images_per_s"] for line in logged if "images_per_s" in line]
    rates = sorted(rates[1:] or rates)  # the first steps compile
    its, others = (summary["evaluations"]["test"] for summary in (resumed, other))
    limit = LIMITS["cuda" if torch.cuda.is_available() else "cpu"]
    difference = abs(its["loss"] / others["loss"] - 1)
    return {
        "backbone": point["backbone"],
        "image_size": point["image_size"],
        "batch_size": point["batch"],
        "steps": resumed["steps"],
        "matrix_products": resumed["matrix_products"],
        "images_per_s": rates[len(rates) // 2],
        "first_batch_s": round(logged[0]["data_wait_ms"] * logged[0]["step"] / 1000, 3),
        "test_loss": round(its["loss"], 5),
        "test_loss_whole": round(others["loss"], 5),
        "loss_difference": round(difference, 8),
        "limit": limit,
        "test_top1": its["top1"],
        "evaluated_top1": evaluated["top1"],
        "wall_s": round(time.perf_counter() - begin, 1),
        "met": difference <= limit and abs(evaluated["top1"] - its["top1"]) <= limit,
    }


KINDS: dict[str, Callable[[Row], Row]] = {"run": measure_run}


def train(point: Row, run: Path) -> list[str]:
    """The command without what is different in each of its calls; precision and compilation are left to `auto`."""
    settings = {
        "data.shards": point["shards"],
        "data.image_size": point["image_size"],
        "data.crop_margin": point["crop_margin"],
        "model.backbone": point["backbone"],
        "model.dropout": 0.1,
        "train.run": run,
        "train.epochs": 1,
        "train.batch_size": point["batch"],
        "train.log_every": LOG_EVERY,
    }
    return ["train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """`dist-train` with these arguments, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dist_train.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment_of_one_process(),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it wrote. Raises WorkError where it failed, with its last line."""
    said, complaints = process.communicate()
    if process.returncode:
        lines = [line for line in complaints.splitlines() if line.strip()]
        lines = [line for line in lines if line.startswith("error")] or lines
        raise WorkError(f"dist-train {process.args[3]}: {lines[-1] if lines else process.returncode}")
    return said
