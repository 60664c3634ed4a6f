"""Benchmarks of what something gains: training runs, and what they claim."""
