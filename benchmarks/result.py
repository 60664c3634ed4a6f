"""Benchmark results: one JSON file each, with what is needed to judge and repeat it."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks.load import OtherProcesses
from dist_train.errors import WorkError
from dist_train.files import write_atomically
from dist_train.machine import ask_git, gpu_names, processor_name, software

RESULTS = Path(__file__).parent / "results"
_OTHERS = OtherProcesses()
_PACKAGES = (
    *("torch", "torchvision", "nvidia-dali-cuda120", "deepspeed", "timm", "transformers", "webdataset"),
    *("ffcv", "spdl", "numpy", "numba"),
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
        "busy_elsewhere": _OTHERS.share(),
        "versions": software(_PACKAGES),
        "parameters": parameters,
        "rows": rows,
    } | (more or {})
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    return path


def read_rows(bench: str, name: str) -> list[dict[str, Any]]:
    """The rows of a result; none where there is no such result."""
    return read_result(bench, name).get("rows", [])


def begun_document(bench: str, name: str) -> dict[str, Any]:
    """A result that is continued, with what it was measured beside; empty where there is none."""
    document = read_result(bench, name)
    _OTHERS.before = document.get("busy_elsewhere", 0.0)
    return document


def finished_rows(bench: str, name: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a result that was begun with the same parameters, commit and hardware; else none."""
    document = read_result(bench, name)
    if not document:
        return []
    mine = {"parameters": json.loads(json.dumps(parameters)), "commit": _commit(), "hardware": hardware()}
    if any(document.get(key) != value for key, value in mine.items()):
        path = RESULTS / bench / f"{name}.json"
        print(f"{path}: of another commit, machine or parameters; measuring all of it again", file=sys.stderr)
        return []
    return begun_document(bench, name)["rows"]


def read_document(path: Path) -> dict[str, Any]:
    """What is in a result file. Raises WorkError where that is none."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise WorkError(f"{path}: not JSON ({error}); measure again, or remove it") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise WorkError(f"{path}: not a benchmark result: it has no list of rows")
    return document


def read_result(bench: str, name: str) -> dict[str, Any]:
    """A result; empty where there is none. Raises WorkError for a file that is none."""
    path = RESULTS / bench / f"{name}.json"
    return read_document(path) if path.exists() else {}


def hardware() -> dict[str, Any]:
    """Processor, usable cores, memory and GPUs of this machine."""
    return {
        "cpu": processor_name(),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpu_names(),
    }


def _commit() -> str:
    """The commit of the working tree, with "+" if it has changes beside the results; "" outside of git."""
    commit = ask_git("rev-parse", "--short", "HEAD")
    if commit is None:
        return ""
    # A sweep rewrites its result row by row: that result is no change of what measures.
    results = [f":(top,exclude)benchmarks/{name}" for name in ("results", "results.html", "RESULTS.md")]
    return commit + ("+" if ask_git("status", "--porcelain", "--untracked-files=no", "--", ":/", *results) else "")
