"""The command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.arguments import numbers, parse, words
from benchmarks.claims.precision import BENCHMARK
from benchmarks.speed import sweep
from dist_train.errors import UseError
from dist_train.parse import parse_recipe


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


def test_a_sweep_accumulates_from_the_recipes_micro_batch_unless_it_is_given_another() -> None:
    recipe, _ = parse_recipe(["--train.micro_batch_size", "8"])

    def ways(**asked: Any) -> list[tuple[int, Any]]:
        asked = {"heads": "cls", "batches": "8,16", "compile": "none"} | asked
        points = sweep.points(recipe, sweep.Arguments("s", **asked))
        return [(point.train.batch_size, point.train.micro_batch_size) for point in points]

    assert ways() == [(8, 0), (16, 0), (16, 8)]
    assert ways(micro_batch=4) == [(8, 0), (8, 4), (16, 0), (16, 4)]
    with pytest.raises(UseError, match=r"train\.micro_batch_size 8 does not divide the batch size 20"):
        ways(batches="20")
    recipe, _ = parse_recipe(["--train.micro_batch_size", "auto"])
    with pytest.raises(UseError, match=r"train\.micro_batch_size auto: .* give --micro-batch a number"):
        ways()
