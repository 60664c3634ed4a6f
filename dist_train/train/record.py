"""What a run leaves behind: recipe.yaml, metrics.jsonl, summary.json, tensorboard/, log.txt. Rank 0 writes, alone."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml

from dist_train.config import Recipe
from dist_train.data.manifest import write_atomically
from dist_train.errors import UseError
from dist_train.recipe import METRICS_NAME
from dist_train.train.meters import device_name

RECIPE_NAME = "recipe.yaml"
SUMMARY_NAME = "summary.json"
log = logging.getLogger("dist_train")


class RunRecord:
    """Writes a run's files; on ranks other than 0 it does nothing.

    resumed_step: the optimizer steps that count; what an interrupted run logged beyond them is taken out, so that every
    step stands in the record once.
    """

    def __init__(self, run: Path, recipe: Recipe, rank: int, resumed_step: int) -> None:
        self.active = rank == 0
        self.run = run
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        run.mkdir(parents=True, exist_ok=True)
        self._start_log(run / "log.txt")
        write_atomically(run / RECIPE_NAME, yaml.safe_dump(_plain(asdict(recipe)), sort_keys=False).encode())
        self._wandb = _start_wandb(recipe, run) if recipe.train.wandb_project else None
        kept = [line for line in _read_lines(run / METRICS_NAME) if json.loads(line)["step"] <= resumed_step]
        write_atomically(run / METRICS_NAME, "".join(kept).encode())
        self._metrics = open(run / METRICS_NAME, "a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_step + 1)

    def step(self, figures: dict[str, Any], total_steps: int, epochs: int) -> None:
        """Record a logged step and print its line."""
        if not self.active:
            return
        self._write(figures, "train")
        log.info(
            "step %d/%d  epoch %.2f/%d  loss %.4f  lr %.3g  %.1f images/s  wait %.1f ms  mfu %.2f  %.0f MB  %s left",
            figures["step"],
            total_steps,
            figures["epoch"],
            epochs,
            figures["loss"],
            figures["lr"],
            figures["images_per_s"],
            figures["data_wait_ms"],
            figures["mfu"],
            figures["memory_mb"],
            timedelta(seconds=round((total_steps - figures["step"]) * figures["step_ms"] / 1000)),
        )

    def evaluation(self, figures: dict[str, Any]) -> None:
        """Record an evaluation and print its line."""
        if not self.active:
            return
        self._write(figures, figures["split"])
        log.info(
            "%s after step %d: top-1 %.4f  top-5 %.4f  loss %.4f  over %d samples%s",
            figures["split"],
            figures["step"],
            figures["top1"],
            figures["top5"],
            figures["loss"],
            figures["samples"],
            f", {figures['bad_samples']} bad ones left out" if figures["bad_samples"] else "",
        )

    def summary(self, figures: dict[str, Any]) -> None:
        """Write summary.json."""
        if self.active:
            document = json.dumps(figures | describe_software(), indent=1) + "\n"
            write_atomically(self.run / SUMMARY_NAME, document.encode())

    def close(self) -> None:
        """Flush everything; the record takes nothing more."""
        if self.active:
            self._metrics.close()
            self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
            self._log_file.close()
            log.removeHandler(self._log_file)

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, figures: dict[str, Any], group: str) -> None:
        self._metrics.write(json.dumps(figures) + "\n")
        self._metrics.flush()
        values = {f"{group}/{name}": value for name, value in figures.items() if name not in ("step", "split")}
        for name, value in values.items():
            self._board.add_scalar(name, value, figures["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=figures["step"])

    def _start_log(self, path: Path) -> None:
        self._log_file = logging.FileHandler(path, encoding="utf-8")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._log_file)


def _start_wandb(recipe: Recipe, run: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UseError("train.wandb_project needs the package: pip install wandb") from None
    return wandb.init(
        project=recipe.train.wandb_project, name=run.name, dir=str(run), config=asdict(recipe), resume="allow"
    )


def start_console_log(rank: int) -> None:
    """Send the project's log lines to stderr: rank 0 all of them, other ranks warnings and errors only."""
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log.handlers = [console]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


def describe_software() -> dict[str, Any]:
    """Versions, git commit (None outside a checkout) and hardware, for summaries and benchmark results."""
    names = ("torch", "deepspeed", "nvidia-dali-cuda120", "timm", "transformers", "numpy", "dist-train")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "commit": _git_commit(),
        "hardware": {"cpu": device_name(torch.device("cpu")), "cores": torch.get_num_threads(), "gpus": gpus},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what YAML has."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
