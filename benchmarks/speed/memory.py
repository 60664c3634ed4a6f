"""Memory that torch has allocated: what a step takes at most, and giving back what is over."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


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


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most memory that a step allocates beyond what is there before it, by the allocator's own account."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        step()
    now = peak = 0
    for event in traced.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def limit_memory(limit: int) -> None:
    """Let this process allocate at most `limit` bytes on its device, 0 for no limit."""
    if limit and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    elif limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
