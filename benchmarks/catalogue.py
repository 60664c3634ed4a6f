"""Every benchmark, in the order of the report."""

from __future__ import annotations

from benchmarks.benchmark import Benchmark
from benchmarks.speed import scale

SPEED: tuple[Benchmark, ...] = (scale.BENCHMARK,)
CLAIMS: tuple[Benchmark, ...] = ()
BENCHMARKS = (*CLAIMS, *SPEED)
