"""Energy: a processor's counters as the kernel shows them, here in a made-up /sys, and a GPU's through NVML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import energy
from benchmarks.speed.energy import EnergyMeter, joules_per_step

CPU = torch.device("cpu")


def zone(powercap: Path, folder: str, name: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    """A zone of the powercap framework; returns the file of its counter."""
    where = powercap / folder
    where.mkdir(parents=True)
    (where / "name").write_text(f"{name}\n")
    (where / "energy_uj").write_text(f"{microjoules}\n")
    (where / "max_energy_range_uj").write_text(f"{most}\n")
    return where / "energy_uj"


def test_the_packages_are_added_up_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    first, second = (zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 1000 * n) for n in (0, 1))
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 5),
        zone(tmp_path, "intel-rapl:0:1", "dram", 5),
        zone(tmp_path, "intel-rapl:2", "psys", 5),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5),
    ]
    meter = EnergyMeter(CPU, tmp_path)
    meter.start()
    first.write_text("3000000\n")
    second.write_text("1501000\n")
    for other in others:
        other.write_text("900000000\n")
    assert meter.absent == "" and meter.read() == pytest.approx(3.0 + 1.5)
    meter.start()
    assert meter.read() == 0


def test_a_counter_that_began_again_at_0_has_gone_on(tmp_path: Path) -> None:
    first, second = (zone(tmp_path, f"intel-rapl:{n}", f"package-{n}", 9_000_000, most=10_000_000) for n in (0, 1))
    meter = EnergyMeter(CPU, tmp_path)
    first.write_text("500000")  # 1 J to its end, and half a joule more
    second.write_text("9500000")
    assert meter.read() == pytest.approx(1.5 + 0.5)


def test_where_nothing_can_be_read_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (tmp_path / "none", tmp_path):
        meter = EnergyMeter(CPU, there)
        assert meter.read() is None and meter.absent == f"no counter of a processor (RAPL) in {there}"
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:1", "package-1", 1).unlink()
    meter = EnergyMeter(CPU, tmp_path)  # one of two: half of it would be no answer
    assert meter.read() is None and "cannot be read" in meter.absent and "intel-rapl:1" in meter.absent

    def refuse(file: Path) -> Any:
        def read() -> int:
            raise PermissionError(13, "Permission denied", str(file))

        return read

    monkeypatch.setattr(energy, "_reads", refuse)  # permissions do not keep root, who may run the tests, from reading
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.read() is None and meter.absent == f"{counter} may only be read by root"
    assert joules_per_step(pytest.fail, 1.0, meter, CPU) is None  # no step is made for nothing


class Card:
    """A GPU's counter in NVML, millijoules."""

    total = 7_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.total


def test_a_gpus_counter_is_read_over_a_second_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    card, steps = Card(), []

    def step() -> None:
        steps.append(None)
        card.total += 250

    monkeypatch.setattr(energy, "nvml_device", lambda device: (card, "handle"))
    monkeypatch.setattr(energy, "synchronize", lambda device: None)
    device = torch.device("cuda", 0)
    meter = EnergyMeter(device)
    assert joules_per_step(step, 0.3, meter, device) == pytest.approx(0.25) and len(steps) == 4

    def without_library(device: torch.device) -> Any:
        raise ModuleNotFoundError("No module named 'pynvml'")

    monkeypatch.setattr(energy, "nvml_device", without_library)
    assert EnergyMeter(device).absent == "nvidia-ml-py, which reads a GPU's counter, is not installed"
