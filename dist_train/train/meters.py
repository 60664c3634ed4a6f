"""What a step costs: time, data wait, memory, FLOPs and MFU."""

from __future__ import annotations

import logging
import re
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile, schedule
from torch.utils.flop_counter import FlopCounterMode

from dist_train.machine import processor_name

log = logging.getLogger(__name__)

T = TypeVar("T")

_STRAGGLES = 1.2  # times the median of the other ranks

# Dense peak of bf16/fp16 tensor cores, FLOP/s, from the vendor's data sheets; the first name found counts.
_PEAK_16_BIT = {
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def training_flops_per_sample(model: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of forward and backward for one sample; `inputs` is a batch of one.

    Counted by torch (2 per multiply-add) over both passes, as the model is frozen: nothing is propagated below the
    lowest weight that is trained, and a frozen weight has no gradient. Counted on the meta device, where tensors have a
    shape and nothing is computed. Blocks must not be computed again meanwhile: that is no work of the model.
    """
    training = model.training
    model.eval()  # batch norm cannot train on one sample
    tensors = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    trained = [tensor for tensor in tensors.values() if tensor.requires_grad]
    # By single products: in fused attention torch does not always count any.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = functional_call(model, tensors, tuple(its.to("meta") for its in inputs))
        torch.autograd.grad(logits.sum(), trained, allow_unused=True)
    model.train(training)
    return int(counter.get_total_flops())


def device_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s to measure MFU against: the data sheet's where it is known, else a matrix product measured now."""
    known = None
    if device.type == "cuda" and dtype != torch.float32:
        known = data_sheet_peak(torch.cuda.get_device_name(device))
    return known or matmul_rate(device, dtype)


def data_sheet_peak(name: str) -> float | None:
    """Of the GPU that calls itself so; None where it is not known, as of others with a like name (an A10G is no A10),
    and of a slice of one (MIG)."""
    if "MIG" in name:
        return None
    return next((peak for model, peak in _PEAK_16_BIT.items() if re.search(rf"\b{model}\b", name)), None)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product on this device: the best of the repetitions that fit in `seconds`."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def device_name(device: torch.device) -> str:
    """What the device calls itself: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory since `forget_peak_memory`, in MB (10**6 bytes): allocated by torch on the GPU, or resident in
    this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return peak_resident_mb()


def peak_resident_mb() -> float:
    """Largest resident memory of this process so far, or since `forget_peak_memory`, MB (10**6 bytes).

    Not `ru_maxrss` where Linux says better: that begins with what the parent process held when it started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mb` start over from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")


def outside_torch_mb(device: torch.device) -> float:
    """MB in use on a GPU that torch has not allocated: CUDA's own, DALI's, NCCL's, and other processes'."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free - torch.cuda.memory_reserved(device)) / 1e6


def memory_figures(device: torch.device) -> dict[str, float]:
    """memory_mb: `peak_memory_mb`. On a GPU also memory_reserved_mb, the most that torch took from the driver;
    device_mb, what is in use on the whole GPU, a peak too, as neither torch nor DALI gives anything back between steps;
    outside_torch_mb, the part of it that is not torch's; and how often torch had to free its cache and try again, and
    how often it ran out of memory."""
    figures: dict[str, float] = {"memory_mb": round(peak_memory_mb(device), 1)}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        figures["memory_reserved_mb"] = round(stats["reserved_bytes.all.peak"] / 1e6, 1)
        free, total = torch.cuda.mem_get_info(device)
        figures["device_mb"] = round((total - free) / 1e6, 1)
        figures["outside_torch_mb"] = round(outside_torch_mb(device), 1)
        figures["allocation_retries"] = stats["num_alloc_retries"]
        figures["out_of_memory"] = stats["num_ooms"]
    return figures


def find_stragglers(own_ms: list[float]) -> dict[int, float]:
    """Ranks whose own time of a step is more than 20 % above the median of the others: rank -> ratio to that. (The
    median of all is half the straggler's own where there are two.)"""
    others = (statistics.median(own_ms[:rank] + own_ms[rank + 1 :] or own_ms) for rank in range(len(own_ms)))
    pairs = enumerate(zip(own_ms, others, strict=True))
    return {rank: own / usual for rank, (own, usual) in pairs if own > _STRAGGLES * usual > 0}


@dataclass(frozen=True)
class _Wait:
    """For one batch: how long the host waited, and from where to where the GPU had nothing to do."""

    host: float
    idle_from: torch.cuda.Event
    idle_to: torch.cuda.Event

    def seconds(self) -> float:
        """What it held up: the host alone may be slow between two steps, the GPU alone has work meanwhile."""
        return min(self.host, self.idle_from.elapsed_time(self.idle_to) / 1000)


def _mark() -> torch.cuda.Event:
    """Where the GPU's work so far ends, on its own clock."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class StepMeter:
    """Times the steps between two logged ones. flops_per_sample and peak (FLOP/s of all ranks) give the MFU."""

    device: torch.device
    flops_per_sample: float
    peak: float = 1.0
    steps: int = 0
    samples: int = 0
    forward: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    highest_mb: float = 0.0
    """Largest memory of the steps so far, MB."""
    recorded_mb: float = 0.0
    """What a recorded pass took of memory: replayed, it takes nothing that torch would count."""
    _before_pause: float = 0.0  # of the steps since the reset, where evaluations came in between
    _waited: float = 0.0
    _on_gpu: deque[_Wait] = field(default_factory=deque)  # those that the GPU had not come to when it was looked at

    def measure_peak(self, dtype: torch.dtype, world_size: int) -> None:
        """Measure, or look up, what all ranks' devices could do in `dtype`: until then `mfu` is FLOP/s.

        Other work on the machine can only lower a measured peak: of several the highest counts.
        """
        self.peak = max(self.peak, device_peak(self.device, dtype) * world_size)

    def wait(self, fetch: Callable[[], T]) -> T:
        """Call `fetch` and count its time as data wait; on a GPU only as far as that was idle.

        There the host is ahead of the steps, most of all where they are CUDA graphs: it waits for batches that the GPU
        does not need yet.
        """
        on_gpu = self.device.type == "cuda"
        idle_from = _mark() if on_gpu else None
        start = time.perf_counter()
        result = fetch()
        waited = time.perf_counter() - start
        if idle_from is None:
            self._waited += waited
            return result
        self._on_gpu.append(_Wait(waited, idle_from, _mark()))
        while self._on_gpu and self._on_gpu[0].idle_to.query():
            self._waited += self._on_gpu.popleft().seconds()
        return result

    def data_wait(self) -> float:
        """Seconds that the steps waited for data since the reset, as far as the GPU has come; `synchronize` first."""
        return self._waited + sum(wait.seconds() for wait in self._on_gpu if wait.idle_to.query())

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """What happens inside is this rank's own work: no rank waits for another (but in ZeRO 3)."""
        start = time.perf_counter()
        yield
        self.forward += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (evaluation, checkpoints) counts towards neither the steps' time nor their memory."""
        synchronize(self.device)
        start, before = time.perf_counter(), peak_memory_mb(self.device)
        yield
        synchronize(self.device)
        forget_peak_memory(self.device)
        self._before_pause = max(self._before_pause, before)
        self.started += time.perf_counter() - start

    def step(self, samples: int) -> None:
        """Count one optimizer step over `samples` of all ranks."""
        self.steps += 1
        self.samples += samples

    def own_ms(self) -> float:
        """Milliseconds of a step that this rank spent on its own: waiting for data and in the forward pass.

        The whole step takes all ranks equally long, as they wait for each other in the backward pass. On a GPU the
        forward pass only counts as far as the host waits in it.
        """
        return 1000 * (self.data_wait() + self.forward) / self.steps

    def read(self) -> dict[str, float]:
        """Figures since the last reset: images_per_s, step_ms, data_wait_ms, mfu, and the memory."""
        synchronize(self.device)
        elapsed = time.perf_counter() - self.started
        memory = memory_figures(self.device)
        memory["memory_mb"] = max(memory["memory_mb"], round(max(self._before_pause, self.recorded_mb), 1))
        self.highest_mb = max(self.highest_mb, memory["memory_mb"])
        rate = self.samples / elapsed
        return {
            "images_per_s": round(rate, 2),
            "step_ms": round(1000 * elapsed / self.steps, 2),
            "data_wait_ms": round(1000 * self.data_wait() / self.steps, 2),
            "mfu": round(rate * self.flops_per_sample / self.peak, 4),
        } | memory

    def reset(self) -> None:
        """Begin a new interval now."""
        self.steps, self.samples, self.forward = 0, 0, 0.0
        self._before_pause = self._waited = 0.0
        self._on_gpu.clear()
        forget_peak_memory(self.device)
        self.started = time.perf_counter()


class StepTrace:
    """A torch profiler trace of `steps` optimizer steps of rank 0, after the first ten: RUN/trace.json (Perfetto)."""

    def __init__(self, steps: int, run: Path, rank: int) -> None:
        self._profiler: profile | None = None
        if steps < 1 or rank != 0:
            return
        self._path = run / "trace.json"
        self._profiler = profile(
            schedule=schedule(wait=9, warmup=1, active=steps, repeat=1), on_trace_ready=self._write, profile_memory=True
        )
        self._profiler.start()

    def step(self) -> None:
        """Say that an optimizer step has ended."""
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """End the trace: of a run that ends before its last step to trace it has those that there were."""
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, traced: profile) -> None:
        traced.export_chrome_trace(str(self._path))
        log.info("trace of the steps: %s", self._path)
