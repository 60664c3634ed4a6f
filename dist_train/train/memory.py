"""How much memory a training step will take, found without taking it: its operators run on tensors without data.

The forward and backward pass and the optimizer's step are those of a run, on fake tensors, which have a shape and a
type but no memory; what lives at each moment is added up. torch's own MemTracker does the same, but not where a
parameter is frozen (it hooks them all) nor where a module runs twice in a step, as here in every accumulated one.
ZeRO's engine cannot run so: what it holds beside the pass is arithmetic (`_trace_zero`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.config import Recipe
from dist_train.data.loader import Batch
from dist_train.data.plan import micro_batch_of
from dist_train.models.build import Classifier, build_model
from dist_train.train.ema import WeightAverage
from dist_train.train.engine import build_optimizer
from dist_train.train.losses import Objective
from dist_train.train.mixing import mix_neighbours
from dist_train.train.replica import Replica
from dist_train.train.settings import bucket_numbers, precision_of
from dist_train.train.step import make_forward

# A GPU's allocator hands out multiples of this, bytes.
_GPU_BLOCK = 512
# Workspaces of cuBLAS, which torch counts as allocated, bytes: three of a Hopper's size, by the committed rows of
# `python -m benchmarks gpu`. Those of other GPUs are smaller.
_CUBLAS = 3 * 33_554_432
_MOST_GATHERED = 10**9  # numbers of weights that ZeRO 3 lets live at a time (DeepSpeed's stage3_max_live_parameters)


@dataclass(frozen=True)
class StepMemory:
    """What a training step takes of one rank's memory, MB (10**6 bytes), beside Python, torch and the loader.

    weights, gradients and optimizer: what ZeRO leaves of each on a rank. activations: what the pass over a micro-batch
    takes at most beyond them, its images included. peak: the most at any moment.
    """

    micro_batch: int
    weights_mb: float
    gradients_mb: float
    optimizer_mb: float
    activations_mb: float
    peak_mb: float

    def __str__(self) -> str:
        return (
            f"{self.peak_mb:,.0f} MB (weights {self.weights_mb:,.0f}, gradients {self.gradients_mb:,.0f}, optimizer "
            f"{self.optimizer_mb:,.0f}, activations {self.activations_mb:,.0f}) for micro-batches of {self.micro_batch}"
        )


def predict_step(
    recipe: Recipe, outputs: int, vocabulary: int = 0, world_size: int = 1, on_gpu: bool = False
) -> StepMemory:
    """What a training step of the recipe takes at most on each rank; seconds, and no memory to speak of.

    outputs: classes or tags that the model predicts. vocabulary: the tokenizer's, 0 for a model of images alone.
    on_gpu: count as a GPU's allocator does. By PyTorch's own operators for the CPU, whatever model.compile says and
    where it will run: a GPU's keep the same, but for attention with dropout, whose products are then counted too.
    """
    micro_batch = micro_batch_of(recipe.train.batch_size, world_size, recipe.train.micro_batch_size)
    accumulation = recipe.train.batch_size // world_size // micro_batch
    with torch.device("meta"):
        model, _ = build_model(
            replace(recipe.model, weights="none"), recipe.data.image_size, outputs, vocabulary, [""] * outputs
        )
    random = torch.get_rng_state()  # which checkpointed blocks set, to the meaningless state of a fake tensor
    try:
        with FakeTensorMode(), LiveBytes(_GPU_BLOCK if on_gpu else 1) as live:
            if recipe.deepspeed.zero_stage == 0:
                passes = min(accumulation, 2)
                traced = _trace_replica(model, recipe, micro_batch, passes, outputs, world_size, live)
            else:
                traced = _trace_zero(model, recipe, micro_batch, outputs, world_size, live)
    finally:
        torch.set_rng_state(random)
    weights, gradients, optimizer, peak = traced
    activations = max(0.0, peak - weights - gradients - optimizer)
    peak += _CUBLAS if on_gpu else 0
    numbers = (round(number / 1e6, 1) for number in (weights, gradients, optimizer, activations, peak))
    return StepMemory(micro_batch, *numbers)


class LiveBytes(TorchDispatchMode):
    """While this lasts, adds up the bytes of the storages that operators make, until nothing refers to them.

    block: what an allocation is rounded up to, bytes. now, peak: at this moment, and at most since `forget`.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block, self.now, self.peak = block, 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def forget(self) -> None:
        """Let `peak` start over from what is there now."""
        self.peak = self.now

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known:
            return
        size = math.ceil(storage.nbytes() / self.block) * self.block

        def gone(_: object) -> None:
            self.now -= size
            del self._known[place]

        self._known[place] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


# ---------------------------------------------------------------- the passes
def _trace_replica(
    model: Classifier, recipe: Recipe, micro_batch: int, passes: int, outputs: int, world_size: int, live: LiveBytes
) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer and of the peak in the second step at ZeRO 0, which is a run's own."""
    weights = _make_fake(model, torch.float32, live)
    optimizer = build_optimizer(recipe.optim, model)
    cpu = torch.device("cpu")
    engine = Replica(model, optimizer, cpu, accumulation=passes, clip_norm=recipe.optim.clip_norm, world_size=1)
    gradients = sum(parameter.nbytes for parameter in engine.trained)
    if world_size > 1:  # they lie in the buckets that are exchanged
        engine.keeps_gradients = True
        for parameter in engine.trained:
            parameter.grad = torch.zeros_like(parameter)
    average = WeightAverage(model, recipe.train.ema) if recipe.train.ema else None
    run_pass = _pass_of(model, recipe, micro_batch, outputs)
    for step in range(2):  # the first makes the optimizer's state
        live.forget()
        for _ in range(passes):
            run_pass(engine.backward)
            engine.step()
        if average is not None:
            average.update(step + 1)
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return weights, gradients, sum(value.nbytes for value in state), live.peak


def _trace_zero(
    model: Classifier, recipe: Recipe, micro_batch: int, outputs: int, world_size: int, live: LiveBytes
) -> tuple[float, float, float, float]:
    """The same at ZeRO 1 to 3: a pass in the type of DeepSpeed's weights, and by arithmetic what its engine holds, as
    found on one rank and two (tests/train/test_memory.py)."""
    stage, half = recipe.deepspeed.zero_stage, precision_of(recipe.deepspeed) in ("bf16", "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(recipe.deepspeed), torch.float32)
    whole = _make_fake(model, dtype, live)
    average = WeightAverage(model, recipe.train.ema) if recipe.train.ema else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept: list[Tensor] = []

    def reduced(parameter: Tensor) -> None:
        """A gradient has arrived: its rank keeps it, a part at stage 2, and others let go of it."""
        if stage == 2:
            kept.append(torch.empty(math.ceil(parameter.numel() / world_size), dtype=dtype))
        parameter.grad = None

    for parameter in trained if stage > 1 else ():
        parameter.register_post_accumulate_grad_hook(reduced)
    before = live.now
    live.forget()
    _pass_of(model, recipe, micro_batch, outputs)(lambda loss: loss.backward())
    passing = live.peak - before
    averaged = before - whole
    del average
    kept.clear()

    numbers = sum(parameter.numel() for parameter in trained)
    part, width = numbers / world_size, dtype.itemsize
    states = 2 if recipe.optim.name == "adamw" else int(recipe.optim.momentum > 0)
    optimizer = 4 * part * (1 + states)  # with the float32 weights that it steps
    gradients = width * (numbers if stage == 1 else part)
    bucket = width * min(bucket_numbers(numbers), numbers)
    weights, held = float(whole), 0.0
    if stage < 3:
        passing += (2 if stage == 1 else 1) * bucket if world_size > 1 else 0
    else:  # its part of the gradients has a buffer for good; the weights stay gathered from forward to backward pass
        weights, held = whole / world_size, gradients
        passing += 2 * min(whole, width * _MOST_GATHERED) if world_size > 1 else bucket
    stepping = 4 * part + (width * part if half else 0) + (gradients - held)
    return weights, gradients, optimizer, weights + averaged + optimizer + held + max(passing, stepping)


def _pass_of(
    model: Classifier, recipe: Recipe, micro_batch: int, outputs: int
) -> Callable[[Callable[[Tensor], Any]], None]:
    """What makes the forward pass over a micro-batch and hands its loss to the backward pass."""
    forward = make_forward(model, recipe, torch.device("cpu"))
    objective = Objective(recipe.optim, [1] * outputs, torch.device("cpu"))

    def run(backward: Callable[[Tensor], Any]) -> None:
        given = blank_batch(recipe, micro_batch, outputs, torch.device("cpu"))
        batch, mix = mix_neighbours(recipe.data, given, 0, 0, 0)
        del given
        backward(objective(forward(batch).float(), batch.targets, batch.weights, mix))

    return run


def blank_batch(recipe: Recipe, size: int, outputs: int, device: torch.device) -> Batch:
    """A micro-batch as the recipe's loader makes them, of black images."""
    side, tokens = recipe.data.image_size, recipe.model.text_tokens
    with device:
        return Batch(
            torch.zeros(size, 3, side, side),
            torch.zeros(size, dtype=torch.int64),
            torch.ones(size),
            torch.zeros(size, tokens, dtype=torch.int64) if tokens else None,
            torch.ones(size, tokens, dtype=torch.bool) if tokens else None,
            np.arange(size),
            torch.zeros(size, outputs, dtype=torch.bool) if recipe.data.labels == "tags" else None,
        )


def _make_fake(model: Classifier, dtype: torch.dtype, live: LiveBytes) -> int:
    """Give a model on the meta device parameters and buffers that would be in main memory. Returns their bytes.

    dtype: of those that are float32, as `module.to(dtype)`.
    """
    before = live.now
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if tensor.dtype == torch.float32 else tensor.dtype
            made[id(tensor)] = torch.empty(tensor.shape, dtype=kind, device="cpu")
        return made[id(tensor)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return live.now - before
