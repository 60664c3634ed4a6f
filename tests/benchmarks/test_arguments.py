"""The command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.arguments import numbers, parse, words
from benchmarks.claims.precision import BENCHMARK
from dist_train.errors import UseError


def test_a_misspelt_option_of_a_benchmark_is_not_looked_for_in_the_recipe() -> None:
    with pytest.raises(UseError, match=r"there is no option --precisons; did you mean --precisions\?"):
        parse(BENCHMARK, ["--name", "x", "--precisons=bf16"])
    command = parse(BENCHMARK, ["--name", "x", "--train.epochs", "3", "--config", "my.yaml"])
    assert command.recipe_arguments == ["--train.epochs", "3", "--config", "my.yaml"]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("step --name x --steps 0", "benchmarks step: --steps is 0; it must be at least 1"),
        ("step --name x --arms loader --warmup -1", "benchmarks step: --warmup is -1; it must be at least 0"),
        ("batch_size --name x --jobs 0", "benchmarks batch_size: --jobs is 0; it must be at least 1"),
        ("batch_size --name x --batches 0,16", "--batches: numbers from 1 on separated by commas are expected"),
        ("ifa --name x --pairs 0", "benchmarks ifa: --pairs is 0; it must be at least 1"),
        ("exchange --name x --turns 1", "benchmarks exchange: --turns is 1; it must be at least 2"),
        ("loader --images x --name x --seconds 0", "benchmarks loader: --seconds is 0.0; it must be above 0"),
        ("step --name mine/x", "benchmarks step: --name 'mine/x' is not the name of a file"),
        ("scale --name= --samples 100", "benchmarks scale: --name '' is not the name of a file"),
        ("scale --name x --samples 100 --shards 1000", "--samples 100: too few for 1000 shards"),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_measured(
    command: str, said: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
    assert not results.exists()


def test_what_is_named_twice_is_measured_once() -> None:
    assert words("cls,ifa,cls") == ["cls", "ifa"]
    assert numbers("--batches", "16,32,16,016") == [16, 32]
