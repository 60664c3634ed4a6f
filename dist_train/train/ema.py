"""Averaged weights: an exponential moving average over the optimizer steps, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a model's weights and running statistics; every rank of ZeRO 0 to 2 has the same.

    With DeepSpeed's bf16 it is over the weights that the model computes with, which are rounded.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        state = model.state_dict()
        self._average = {name: _float32(tensor).clone() for name, tensor in state.items()}
        # Asked for once: a state dictionary a step takes the host longer than the average takes a GPU.
        tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._weights = {name: tensor for name, tensor in tensors if name in state}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = [], []
        for name, tensor in self._weights.items():
            if tensor.is_floating_point():
                averages.append(self._average[name])
                weights.append(_float32(tensor.detach()))
            else:
                self._average[name].copy_(tensor)  # a count
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged weights."""
        weights = self._model.state_dict()
        raw = {name: tensor.clone() for name, tensor in weights.items()}
        try:
            self._fill(weights, self._average)
            yield
        finally:
            self._fill(weights, raw)

    def state(self) -> dict[str, Tensor]:
        """The average by the model's names, float32 (counts as they are); not copies."""
        return self._average

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        self._fill(self._average, state)

    @staticmethod
    @torch.no_grad()
    def _fill(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(sources[name])


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
