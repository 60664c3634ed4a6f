"""Train image classifiers from WebDataset shards with DALI and DeepSpeed.

From Python, as docs/python.md has it:

    import dist_train

    run = dist_train.train("recipe.yaml", **{"train.epochs": 5})
    model = dist_train.load("runs/mine")
    model.predict("photos/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.api import Run, load, train
    from dist_train.config import Recipe
    from dist_train.errors import UseError, WorkError
    from dist_train.use.model import Model
    from dist_train.use.predict import Prediction

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
