"""The command line of the benchmarks."""

from __future__ import annotations

import pytest

from benchmarks.arguments import parse
from benchmarks.claims.precision import BENCHMARK
from dist_train.errors import UseError


def test_a_misspelt_option_of_a_benchmark_is_not_looked_for_in_the_recipe() -> None:
    with pytest.raises(UseError, match=r"there is no option --precisons; did you mean --precisions\?"):
        parse(BENCHMARK, ["--name", "x", "--precisons=bf16"])
    command = parse(BENCHMARK, ["--name", "x", "--train.epochs", "3", "--config", "my.yaml"])
    assert command.recipe_arguments == ["--train.epochs", "3", "--config", "my.yaml"]
