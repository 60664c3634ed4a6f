"""The process in which the GPU suite measures: one for many points, as importing everything takes over ten seconds."""

from __future__ import annotations

import importlib

import torch

from benchmarks.speed.memory import free_memory
from benchmarks.tables import Row

KINDS = {
    "loss": "gpu_checks:check_loss",
    "pixels": "gpu_checks:check_pixels",
    "training": "gpu_checks:check_training",
    "graphs": "gpu_checks:check_graphs",
    "products": "gpu_checks:check_products",
    "steps": "gpu_steps:measure_steps",
    "compile": "gpu_steps:compile_points",
    "loader": "gpu_loader:measure_loader",
    "run": "gpu_run:measure_run",
}
"""What measures a point of each kind; only what is needed is imported."""


def measure(point: Row) -> Row:
    """The row of a point. Running out of memory is a row; so is, on a GPU, what the point has left allocated."""
    gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if gpu else 0
    try:
        row = measure_kind(point)
    except torch.OutOfMemoryError:
        row = {"out_of_memory": True}
    if gpu and point["kind"] != "run":  # which does everything in processes of its own
        free_memory()
        row["left_mb"] = round((torch.cuda.memory_allocated() - held) / 1e6, 2)
    return row


def measure_kind(point: Row) -> Row:
    """The row of a point, by what measures its kind."""
    module, _, name = KINDS[point["kind"]].partition(":")
    return getattr(importlib.import_module(f"benchmarks.speed.{module}"), name)(point)
