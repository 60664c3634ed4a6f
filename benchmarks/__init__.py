"""Measurements: what things cost and gain. Run as `python -m benchmarks`."""
