"""Forward and backward pass of a micro-batch as one CUDA graph: what runs is recorded once and then launched whole.

A ViT-B's pass is more than a thousand kernels; with less than about 64 images a GPU waits for Python to launch them one
by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_train.data.loader import Batch
from dist_train.train.mixing import Mix
from dist_train.train.replica import Replica

_WARM_UP = 3  # passes before the recording: they compile, choose kernels and allocate workspaces

Inputs = TypeVar("Inputs", Batch, Mix)


class GraphedPass:
    """Forward and backward pass of micro-batches of one shape, recorded with the first and replayed with every other.

    loss_of: from a micro-batch to its mean loss, a scalar. It may read nothing that changes from step to step but its
    arguments, the model's weights and buffers, and the device's generator of random numbers: no host code in it runs
    again. From then on the engine's gradients are the same tensors in every step.
    """

    def __init__(self, engine: Replica, loss_of: Callable[[Batch, Mix | None], Tensor]) -> None:
        self._engine, self._loss_of = engine, loss_of
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch, mix: Mix | None) -> Tensor:
        """Do what `engine.backward(loss_of(batch, mix))` does. Returns the loss, which the next call overwrites.

        To be called first when the engine has no gradients.
        """
        if self._replay is None:
            self._batch, self._mix = _own_tensors(batch), None if mix is None else _own_tensors(mix)
            self._replay, self._loss = self._record()
        else:
            _copy(self._batch, batch)
            if self._mix is not None and mix is not None:
                _copy(self._mix, mix)
        self._replay()
        self._engine.passes += 1
        return self._loss

    def _record(self) -> tuple[Callable[[], None], Tensor]:
        engine = self._engine
        adds_up = engine.accumulation > 1

        def run() -> Tensor:
            if not adds_up:  # a gradient that is there would be added to: two passes over memory more
                engine.drop_gradients()
            loss = self._loss_of(self._batch, self._mix)
            engine.accumulate(loss)
            return loss.detach()

        generator = generator_of(engine.device)
        random = generator.get_state()
        buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
        replay, loss = record(run, engine.device)
        # What the passes so far have changed is put back.
        engine.keeps_gradients = True
        engine.drop_gradients()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        generator.set_state(random)
        return replay, loss


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Call `run` a few times, then record it. Returns what does its kernels again, and the tensor they write to."""
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads go on loading data meanwhile, which would end a recording that watches them too.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = run()
    return graph.replay, loss


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that random operators on the device draw from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator


def _own_tensors(inputs: Inputs) -> Inputs:
    """The same with copies of its tensors."""
    values: dict[str, Any] = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    copies: dict[str, Any] = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(inputs, **copies)


def _copy(target: Inputs, source: Inputs) -> None:
    for field in fields(target):
        to, value = getattr(target, field.name), getattr(source, field.name)
        if isinstance(to, Tensor):
            if to.shape != value.shape:
                raise ValueError(f"{field.name} of a recorded pass is {tuple(to.shape)}, not {tuple(value.shape)}")
            to.copy_(value, non_blocking=True)
