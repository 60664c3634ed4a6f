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
    """What git answers about the checkout that has this file, stripped; None where there is no git or checkout."""
    here = Path(__file__)
    # An environment with this package in it may lie within the checkout of something else.
    for words in (["ls-files", "--error-unmatch", here.name], arguments):
        try:
            answer = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode:
            return None
    return answer.stdout.strip()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may still take: what the machine has free or can free, and no more than
    the control groups around the process (a container's, a job's) have left. root: where /proc and /sys are."""
    import psutil

    free = [psutil.virtual_memory().available]
    memberships = root / "proc/self/cgroup"
    for line in memberships.read_text().splitlines() if memberships.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = root / "sys/fs/cgroup" / controllers
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            )
            # From its own group up to the mount; of a path that the container does not show, the mount alone.
            own = mount / group.strip("/")
            free += [left for folder in (own, *own.parents) if (left := _left_in_group(folder, *names)) is not None]
    return min(free)


def _left_in_group(folder: Path, limit_name: str, usage_name: str) -> int | None:
    """Bytes that a control group may still take; None where it has no limit. Files in the page cache make room."""
    try:
        limit, usage = (folder / limit_name).read_text().strip(), int((folder / usage_name).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return max(0, int(limit) - usage + cached) if limit.isdigit() else None
