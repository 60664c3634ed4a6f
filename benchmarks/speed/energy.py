"""Energy: the joules that a device takes in a window, by a GPU's own counter (NVML) or a processor's (RAPL)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_train.train.meters import synchronize

POWERCAP = Path("/sys/class/powercap")
ENOUGH_S = 1.0  # a GPU's counter moves every tenth of a second or so: a shorter window says little


@dataclass(frozen=True)
class Counter:
    """A counter of energy. read: its value; joules: of one of its units; starts_again: the value after which it begins
    at 0 again, 0 where it never does."""

    read: Callable[[], int]
    joules: float
    starts_again: int = 0

    def since(self, before: int) -> float:
        """Joules since the counter stood at `before`; right as long as it began again at most once."""
        now = self.read()
        return self.joules * (now - before + (self.starts_again if now < before else 0))


class EnergyMeter:
    """Joules that a device takes from `start` to `read`.

    A GPU's are those of the whole card, a processor's those of all its packages without the memory's, whatever else
    runs there. absent: why nothing can be read, "" where it can.
    """

    def __init__(self, device: torch.device, powercap: Path = POWERCAP) -> None:
        self._counters: list[Counter] = []
        self.absent = ""
        try:
            self._counters = gpu_counters(device) if device.type == "cuda" else processor_counters(powercap)
            self.start()
        except LookupError as error:
            self.absent = str(error.args[0])
        except PermissionError as error:
            self.absent = f"{error.filename} may only be read by root"
        except Exception as error:  # what a driver says, or /sys of an odd machine
            self.absent = f"the counter cannot be read: {error}"
        if self.absent:
            self._counters = []

    def start(self) -> None:
        """Begin to count."""
        self._before = [counter.read() for counter in self._counters]

    def read(self) -> float | None:
        """Joules since `start`; None where nothing can be read."""
        if not self._counters:
            return None
        return sum(counter.since(before) for counter, before in zip(self._counters, self._before, strict=True))


def joules_per_step(step: Callable[[], Any], seconds: float, meter: EnergyMeter, device: torch.device) -> float | None:
    """Energy of a step of about `seconds`, over as many as the counter needs to be true; None where there is none."""
    if meter.absent:
        return None
    steps = math.ceil(ENOUGH_S / seconds)
    synchronize(device)
    meter.start()
    for _ in range(steps):
        step()
    synchronize(device)
    joules = meter.read()
    return None if joules is None else joules / steps


def gpu_counters(device: torch.device) -> list[Counter]:
    """The counter of a GPU, millijoules since its driver was loaded. Raises LookupError where NVML is not installed,
    NVML's own errors where the card has none."""
    try:
        nvml, handle = nvml_device(device)
    except ModuleNotFoundError:
        raise LookupError("nvidia-ml-py, which reads a GPU's counter, is not installed") from None
    return [Counter(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1e-3)]


def processor_counters(powercap: Path = POWERCAP) -> list[Counter]:
    """A counter for each package of the processor, microjoules. Raises LookupError where there is none, OSError where
    one cannot be read.

    The kernel names a package's zone `intel-rapl:N`, on processors of AMD too, and its parts `intel-rapl:N:M`. A zone
    `psys` is the whole board, with the packages in it, and `intel-rapl-mmio:N` is a package once more.
    """
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
    if not packages:
        raise LookupError(f"no counter of a processor (RAPL) in {powercap}")
    return [
        Counter(_reads(zone / "energy_uj"), 1e-6, int((zone / "max_energy_range_uj").read_text())) for zone in packages
    ]


def _reads(file: Path) -> Callable[[], int]:
    return lambda: int(file.read_text())


def nvml_device(device: torch.device) -> tuple[Any, Any]:
    """NVML, and its handle of a GPU. Raises whatever it raises where there is none."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
