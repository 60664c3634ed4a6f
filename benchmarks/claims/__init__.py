"""Benchmarks of what something gains: training runs, the paper's claims, and what a run must survive."""

from __future__ import annotations

from importlib.util import find_spec

from dist_train.errors import UseError


def require(package: str, module: str) -> None:
    """Raise UseError, naming the cure, where a package of the extra `benchmarks` is not installed."""
    if find_spec(module) is None:
        raise UseError(f'this benchmark needs {package}: pip install -e ".[benchmarks]"')
