"""Every benchmark, in the order of the report."""

from __future__ import annotations

from benchmarks.benchmark import Benchmark
from benchmarks.claims import agreement, gap, histogram, kill, knee, landscape, noise, paper, precision, probe, study
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
    gap.BENCHMARK,
    paper.BENCHMARK,
    landscape.BENCHMARK,
    knee.BENCHMARK,
    precision.BENCHMARK,
    noise.BENCHMARK,
    probe.BENCHMARK,
    kill.BENCHMARK,
    agreement.BENCHMARK,
    histogram.BENCHMARK,
)
BENCHMARKS = (*CLAIMS, *SPEED)
