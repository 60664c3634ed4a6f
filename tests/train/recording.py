"""A CUDA graph's behaviour on the CPU: operators are recorded once and replayed on the same memory.

As with a graph, no Python of the recorded function runs again: a replay reads and writes the tensors of the recording,
numbers that Python knew are those of the recording, and asking a tensor for its value is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ASKS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """In the place of `dist_train.train.graphs.record`."""
    for _ in range(2):
        run()
    with Tape() as tape:
        result = run()
    return tape.replay, result


class Tape(TorchDispatchMode):
    """The operators called while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).startswith(_ASKS):
            raise RuntimeError(f"{func} asks for a value, which cannot be recorded")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again."""
        for func, args, kwargs, before in self.calls:
            inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            for target, value in zip(before, tensors(func(*args, **kwargs)), strict=True):
                if target.numel() and target.untyped_storage().data_ptr() not in inputs:  # no view of what was read
                    target.detach().copy_(value)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
