"""Memory that torch has allocated: what a step takes at most, and giving back what is over."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ifa import peak_bytes


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on the CPU, where torch does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_mb(step: Callable[[], Any], device: torch.device, base: int) -> float:
    """The most MB that are allocated in a step, beyond the `base` bytes that were before its model was built; on a CPU
    only what the step itself allocates."""
    before = allocated(device)
    return (peak_bytes(step, device) + before - base) / 1e6


def free_memory() -> None:
    """Give back what nothing refers to any more, to the driver too."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # one for each stream that a graph was recorded on
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
