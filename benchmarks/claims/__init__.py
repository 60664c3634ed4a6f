"""Benchmarks of what something gains: training runs, the paper's claims, and what a run must survive."""

from __future__ import annotations

from dist_train.errors import UseError
from dist_train.machine import is_installed


def require(package: str, module: str) -> None:
    """Raise UseError, naming the cure, where a package of the extra `benchmarks` is not installed."""
    if not is_installed(module):
        raise UseError(f'this benchmark needs {package}: pip install -e ".[benchmarks]"')
