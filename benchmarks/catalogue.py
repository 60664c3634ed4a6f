"""Every benchmark, in the order of the report."""

from __future__ import annotations

from benchmarks.benchmark import Benchmark
from benchmarks.claims import histogram, kill, landscape, paper, precision, study
from benchmarks.speed import scale

SPEED: tuple[Benchmark, ...] = (scale.BENCHMARK,)
CLAIMS: tuple[Benchmark, ...] = (
    study.BENCHMARK,
    paper.BENCHMARK,
    landscape.BENCHMARK,
    precision.BENCHMARK,
    kill.BENCHMARK,
    histogram.BENCHMARK,
)
BENCHMARKS = (*CLAIMS, *SPEED)
