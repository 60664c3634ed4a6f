"""The training loop; the only place that knows DeepSpeed.

The package can be called: `dist_train.train(recipe)` is `dist_train.api.train`. Python puts a package into the one
around it under its own name as soon as anything in it is imported, so a function of that name would be lost then.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dist_train.api import RecipeLike, Run


class _CallablePackage(ModuleType):
    """See "Customizing module attribute access" in the reference of Python."""

    def __call__(self, recipe: RecipeLike = None, /, *, resume: str | int | Path = "none", **overrides: Any) -> Run:
        """Train by a recipe; see `dist_train.api.train`."""
        from dist_train.api import train

        return train(recipe, resume=resume, **overrides)


sys.modules[__name__].__class__ = _CallablePackage

_SAYS_NOTHING = (
    "Setting accelerator to CPU",  # nor is a GPU missing where there is none
    "untested optimizer",  # with ZeRO: the tests here have all of torch's that a recipe may name
)


def _tells_something(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in _SAYS_NOTHING)


logging.getLogger("DeepSpeed").addFilter(_tells_something)  # before its import, which is where the first is said
