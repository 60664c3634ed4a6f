"""The command `python -m benchmarks`."""

from __future__ import annotations

import json
import sys

from benchmarks import old, report
from benchmarks.arguments import Command
from benchmarks.arguments import parse as parse_arguments
from benchmarks.catalogue import BENCHMARKS
from dist_train.errors import UseError, run_command
from dist_train.output import keep_stdout, say

COMMANDS = {benchmark.name: benchmark for benchmark in (*BENCHMARKS, report.COMMAND)}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit status."""

    def command() -> int:
        asked = parse(arguments)  # --help goes to standard output: before that is kept for results
        if arguments is None:
            keep_stdout()
        if not isinstance(asked, Command):
            return asked.command(asked)
        benchmark = asked.benchmark
        path = benchmark.run(asked.arguments, *([asked.recipe] if benchmark.takes_recipe else []))
        if path is not None:
            say(benchmark.say_headline(json.loads(path.read_bytes())), path)
        return 0

    return run_command(command)


def parse(arguments: list[str] | None = None) -> Command:
    """The benchmark that the words name, and what they ask of it. Raises UseError, SystemExit after --help."""
    name, *words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {name:{width}}  {benchmark.title}" for name, benchmark in COMMANDS.items())
        print(f"usage: python -m benchmarks BENCHMARK [--help] ...\n\nWhat things cost and gain.\n\n{listed}")
        raise SystemExit(0)
    if name not in COMMANDS:
        if name in old.COMMANDS:
            return old.parse([name, *words])
        raise UseError(f"benchmarks: there is no '{name}'; there are {', '.join(COMMANDS)}")
    return parse_arguments(COMMANDS[name], words)


if __name__ == "__main__":
    sys.exit(main())
