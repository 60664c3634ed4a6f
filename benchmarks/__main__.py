"""The command `python -m benchmarks`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dist_train.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What things cost and gain.")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    histogram = commands.add_parser("histogram", help="accuracy that colours alone give on a shard set")
    histogram.add_argument("set", type=Path, metavar="SET", help="folder of the shard set")
    histogram.set_defaults(command=_histogram)
    options = parser.parse_args(arguments)
    return run_command(lambda: options.command(options))


def _histogram(options: argparse.Namespace) -> int:
    from benchmarks.colour_histogram import colour_histogram_accuracy

    accuracy, samples = colour_histogram_accuracy(options.set)
    print(f"{options.set}: logistic regression on colour histograms: test top-1 {accuracy:.4f} over {samples} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
