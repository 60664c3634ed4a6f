"""Benchmark results: one JSON file each, with what is needed to judge and repeat it."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from dist_train.files import write_atomically

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *("torch", "torchvision", "nvidia-dali-cuda120", "deepspeed", "timm", "transformers", "webdataset"),
    *("ffcv", "numpy", "numba"),
)


def write_result(
    bench: str, name: str, parameters: dict[str, Any], rows: list[dict[str, Any]], more: dict[str, Any] | None = None
) -> Path:
    """Write `benchmarks/results/BENCH/NAME.json` (docs/benchmarks.md); returns its path.

    more: further entries of the document, such as what the rows answer.
    """
    path = RESULTS / bench / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "bench": bench,
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "parameters": parameters,
        "rows": rows,
    } | (more or {})
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    return path


def read_rows(bench: str, name: str) -> list[dict[str, Any]]:
    """The rows of a result; none where there is no such result."""
    path = RESULTS / bench / f"{name}.json"
    return json.loads(path.read_bytes())["rows"] if path.exists() else []


def finished_rows(bench: str, name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result that was begun with the same parameters, commit and hardware; else none."""
    path = RESULTS / bench / f"{name}.json"
    if not path.exists():
        return []
    document = json.loads(path.read_bytes())
    mine = {"parameters": json.loads(json.dumps(parameters)), "commit": _commit(), "hardware": hardware()}
    if any(document[key] != value for key, value in mine.items()):
        print(f"{path}: of another commit, machine or parameters; measuring all of it again", file=sys.stderr)
        return []
    return document["rows"]


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory and GPUs of this machine."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the working tree, with "+" if it has changes beside the results; "" outside of git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()

    # A sweep rewrites its result row by row: that result is no change of what measures.
    code = (":/", *(f":!{name}" for name in ("results", "results.html", "RESULTS.md")))
    try:
        commit = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except FileNotFoundError:  # no git here
        return ""
    return commit + ("+" if changes else "")
