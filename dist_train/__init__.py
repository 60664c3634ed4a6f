"""Train image classifiers from WebDataset shards with DALI and DeepSpeed.

From Python, as docs/python.md has it:

    import dist_train

    run = dist_train.train("recipe.yaml", **{"train.epochs": 5})
    model = dist_train.load("runs/mine")
    model.predict("photos/")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.api import Run, load, train
    from dist_train.config import Recipe
    from dist_train.errors import UseError, WorkError
    from dist_train.use.model import Model
    from dist_train.use.predict import Prediction

if "OMP_WAIT_POLICY" not in os.environ:
    # GNU's OpenMP threads spin for about a millisecond where they wait for each other, at each of thousands of
    # operators: with another process on the cores a step takes tens of times as long. So they give up the core early,
    # and late enough for an idle machine not to notice. It is read as PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"
__all__ = ["Model", "Prediction", "Recipe", "Run", "UseError", "WorkError", "__version__", "load", "train"]

_LIES_IN = {
    "Run": "dist_train.api",
    "load": "dist_train.api",
    "Recipe": "dist_train.config",
    "UseError": "dist_train.errors",
    "WorkError": "dist_train.errors",
    "Model": "dist_train.use.model",
    "Prediction": "dist_train.use.predict",
}


def __getattr__(name: str) -> Any:
    """Imported when it is used: importing this package takes milliseconds, PyTorch and DALI take seconds."""
    if name == "train":  # the package of that name, which can be called
        return import_module("dist_train.train")
    if name in _LIES_IN:
        return getattr(import_module(_LIES_IN[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
