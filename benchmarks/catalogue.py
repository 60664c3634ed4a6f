"""Every benchmark, in the order of the report."""

from __future__ import annotations

from benchmarks.benchmark import Benchmark
from benchmarks.claims import agreement, histogram, kill, landscape, paper, precision, probe, study
from benchmarks.speed import batch_size, engine, exchange, gpu, ifa, loader, prediction, scale, step

SPEED: tuple[Benchmark, ...] = (
    batch_size.BENCHMARK,
    ifa.BENCHMARK,
    gpu.BENCHMARK,
    step.BENCHMARK,
    engine.BENCHMARK,
    exchange.BENCHMARK,
    loader.BENCHMARK,
    scale.BENCHMARK,
    prediction.BENCHMARK,
)
CLAIMS: tuple[Benchmark, ...] = (
    study.BENCHMARK,
    paper.BENCHMARK,
    landscape.BENCHMARK,
    precision.BENCHMARK,
    probe.BENCHMARK,
    kill.BENCHMARK,
    agreement.BENCHMARK,
    histogram.BENCHMARK,
)
BENCHMARKS = (*CLAIMS, *SPEED)
