"""What a GPU does in a step: its kernels by kind, the longest of them, and how long it has nothing to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that the kernel's name matches. Compiled kernels say in their names which operators they make one of.
KINDS = {
    "compiled": r"^triton_(?!tem)",
    "copies": r"^Mem(cpy|set)|copy|CatArray",
    "attention": r"flash|fmha|attention|softmax_warp",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas|triton_tem",
    "optimizer": r"multi_tensor|[Ff]used_?(SGD|sgd|[Aa]dam)",
    "layer norms": r"layer_?norm|LayerNorm|GammaBeta",
    "JPEG": r"jpeg|nvjpg|huff|idct|ycc|upsampl|dct",
    "sums": r"reduce_kernel",
    "elementwise": r"elementwise",
}
_LONGEST = 8
_NAME = 90  # characters of a kernel's name that are kept: templates fill lines


def kernels_of(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Where a GPU's time goes in `steps` calls, as CUPTI saw it. Milliseconds of one call.

    total_ms: from the first kernel's begin to the last one's end. idle_ms: of that, with no kernel running. kernels:
    how many run. by_kind, longest: summed over kernels, so that what runs at once counts twice. Looking on makes the
    host slower: idle_ms is an upper bound where the host launches kernels one by one.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as looked:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    events = [event for event in looked.profiler.kineto_results.events() if event.device_type() == DeviceType.CUDA]
    # A range that the host has named covers kernels and is none.
    spans = [(event.start_ns(), event.end_ns(), event.name()) for event in events if not event.is_user_annotation()]
    return summed(spans, steps)


def summed(spans: list[tuple[int, int, str]], steps: int) -> dict[str, Any]:
    """As `kernels_of`, of kernels given by begin and end, ns, and name."""
    if not spans:
        return {}
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for begin, end, name in spans:
        kinds[kind_of(name)] += end - begin
        names[name[:_NAME]] += end - begin

    def ms(nanoseconds: int) -> float:
        return round(nanoseconds / steps / 1e6, 4)

    first, last = min(begin for begin, _, _ in spans), max(end for _, end, _ in spans)
    return {
        "total_ms": ms(last - first),
        "idle_ms": ms(last - first - _covered(spans)),
        "kernels": round(len(spans) / steps, 1),
        "by_kind": {kind: ms(time) for kind, time in kinds.most_common()},
        "longest": {name: ms(time) for name, time in names.most_common(_LONGEST)},
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def _covered(spans: list[tuple[int, int, str]]) -> int:
    """Nanoseconds in which at least one of them runs."""
    covered, reached = 0, 0
    for begin, end, _ in sorted(spans):
        covered += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
