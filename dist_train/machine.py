"""What this machine is and what is installed on it, as summaries, benchmarks and `dist-train doctor` name it."""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def is_installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported to find out.

    A folder of its name, such as `wandb` leaves wherever it has run, or what an uninstalled package leaves behind, is
    found as a package too, but has no file.
    """
    found = importlib.util.find_spec(package)
    return found is not None and getattr(found, "origin", "") is not None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None for those that are not there."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def software(packages: Iterable[str]) -> dict[str, str | None]:
    """The same, headed by Python's own version."""
    return {"python": platform.python_version(), **versions(packages)}


def processor_name() -> str:
    """What the processor calls itself."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def gpu_names() -> list[str]:
    """The GPUs that torch sees here."""
    import torch  # slow; who only asks for versions need not wait

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def ask_git(*arguments: str) -> str | None:
    """What git answers about the checkout that holds this file, stripped; None where there is no git or checkout."""
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
