"""What the ranks of a run tell each other, beside gradients. All ranks call each of these together."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dist_train.errors import UseError, WorkError
from dist_train.place import Place
from dist_train.train.meters import StepMeter, find_stragglers

log = logging.getLogger(__name__)
T = TypeVar("T")


def mean_over_ranks(value: Tensor, world_size: int) -> float:
    """The mean of every rank's `value`."""
    if world_size > 1:
        torch.distributed.all_reduce(value)
    return float(value) / world_size


def gather(value: Any, place: Place) -> list[Any]:
    """Every rank's value, by rank."""
    if place.world_size == 1:
        return [value]
    values = [None] * place.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_zero(function: Callable[[], T], place: Place) -> T:
    """What the function returns on rank 0, which alone calls it; its UseError or WorkError is raised on every rank."""
    answer: list[Any] = [None, None]
    if place.rank == 0:
        try:
            answer[0] = function()
        except (UseError, WorkError) as error:
            answer[1] = error
    if place.world_size > 1:
        torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def warn_of_stragglers(meter: StepMeter, place: Place) -> None:
    """Log each rank whose own work takes more than 20 % longer than the others'."""
    mine = (meter.own_ms(), 1000 * meter.data_wait() / meter.steps, socket.gethostname())
    everyone = gather(mine, place)
    for rank, ratio in find_stragglers([own for own, _, _ in everyone]).items():
        own, wait, host = everyone[rank]
        if place.rank == 0:
            log.warning(
                "straggler: rank %d on %s takes %.0f ms a step before it meets the others (%.0f ms of it for data), "
                "%.2f times the median of the others",
                rank,
                host,
                own,
                wait,
                ratio,
            )


def average_batch_statistics(model: nn.Module, world_size: int) -> None:
    """Give every rank the mean of all ranks' running statistics, so that the model is one model."""
    if world_size == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class StopSignal:
    """Makes SIGTERM, SIGUSR1, Ctrl-C and the end of the terminal (SIGHUP) end the run after the step it is at.

    All ranks agree on the step, waiting timeout_s at most. A second Ctrl-C interrupts at once. Signals that were
    ignored when the process began, as under nohup, stay ignored.
    """

    def __init__(self, timeout_s: float) -> None:
        self.interrupted = False
        """Whether it was Ctrl-C."""
        self.received: int | None = None
        """The signal that has come last to this process."""
        self._received = False
        self._timeout = timedelta(seconds=timeout_s)
        self._before: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
            return self
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        # A second SIGTERM, from whoever ends all processes in turn, must not turn a good end into a failure.
        for number in self._before.keys() & {signal.SIGINT, signal.SIGHUP}:
            signal.signal(number, self._before[number])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            # Not by the log: the signal may have come while the main thread held its lock.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                os.write(2, b"\ninterrupted: saving a checkpoint after this step; Ctrl-C again ends without one\n")
        self._received = True

    def requested(self, place: Place) -> bool:
        """Whether any rank was asked to stop; all ranks call this after each step."""
        if place.world_size == 1:
            return self._received
        # On the CPU, so that no rank waits for its GPU here.
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        flag = torch.tensor(int(self._received))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        # What the ranks agreed on. A signal that has come meanwhile is theirs to hear of after the next step.
        return bool(flag)
