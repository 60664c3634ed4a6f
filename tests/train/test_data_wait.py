"""A step waits for data where the GPU does, not where the host is ahead of it: on a device made of two clocks."""

from __future__ import annotations

import time

import pytest
import torch

from dist_train.train import meters
from dist_train.train.meters import StepMeter


class Device:
    """A host and a GPU, seconds each: the GPU does one piece of work after the other, as soon as it is given."""

    def __init__(self) -> None:
        self.host = 1.0
        self.gpu_free = 0.0
        """When it has done all that it was given."""

    def give(self, seconds: float) -> None:
        self.gpu_free = max(self.gpu_free, self.host) + seconds

    def spend(self, seconds: float) -> None:
        self.host += seconds

    def synchronize(self) -> None:
        self.host = max(self.host, self.gpu_free)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            device.give(0.0)
            self.at = device.gpu_free

        def query(self) -> bool:
            return self.at <= device.host

        def elapsed_time(self, other: Event) -> float:
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(meters, "synchronize", lambda _: device.synchronize())
    monkeypatch.setattr(meters, "forget_peak_memory", lambda _: None)
    monkeypatch.setattr(meters, "memory_figures", lambda _: {"memory_mb": 0.0})
    monkeypatch.setattr(time, "perf_counter", lambda: device.host)
    return device


@pytest.mark.parametrize(
    ("batch_s", "host_s", "gpu_s", "wait_s"),
    [
        (0.020, 0.001, 0.030, 0.0),  # the host waits for a batch while the GPU is at the last one
        (0.020, 0.001, 0.005, 0.015),  # the GPU waits: 20 ms less 5 that it works, 1 of which the host takes to launch
        (0.000, 0.030, 0.005, 0.0),  # the GPU waits for the host, which waits for nothing
        (0.020, 0.030, 0.005, 0.020),  # for both
    ],
)
def test_the_wait_for_data_is_what_the_gpu_waits(
    device: Device, batch_s: float, host_s: float, gpu_s: float, wait_s: float
) -> None:
    meter = StepMeter(torch.device("cuda"), 1.0, 1.0)
    for steps in (1, 50):  # the first batch is waited for in any case
        meter.reset()
        for _ in range(steps):
            meter.wait(lambda: device.spend(batch_s))
            device.give(gpu_s)
            device.spend(host_s)
            meter.step(1)
        figures = meter.read()
        device.synchronize()
    # Of the first step after the meter was read nothing else is left to do.
    assert figures["data_wait_ms"] == pytest.approx(1000 * wait_s, abs=1000 * batch_s / 50 + 1.1)


def test_on_a_cpu_it_is_what_the_host_waits(device: Device) -> None:
    meter = StepMeter(torch.device("cpu"), 1.0, 1.0)
    meter.reset()
    for _ in range(4):
        meter.wait(lambda: device.spend(0.02))
        device.spend(0.03)
        meter.step(1)
    assert meter.read()["data_wait_ms"] == 20.0
