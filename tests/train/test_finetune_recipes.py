"""The recipes for fine-tuning: each can be trained where its first lines say, and is found without a checkout."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dist_train.cli import main
from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo
from dist_train.errors import UseError
from dist_train.models.build import build_model
from dist_train.parse import RECIPES, find_recipe, own_recipes, parse_recipe, recipe_from_python
from dist_train.recipe import problems
from tests.harness import REPOSITORY

FINETUNE = sorted((REPOSITORY / "launch" / "recipes" / "finetune").glob("*.yaml"))
RANKS = {"one GPU": 1, "a CPU": 1, "one node of 8 GPUs": 8, "several nodes of 8 GPUs": 32}


def header(file: Path) -> list[str]:
    """The comment that a recipe opens with."""
    lines = file.read_text().splitlines()
    return [line.lstrip("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]


def set_of(samples: int) -> Manifest:
    """What a set of so many images says of itself."""
    splits = {
        name: SplitInfo(count, (ShardInfo(f"{name}-000000.tar", count, 1, ""),))
        for name, count in {"train": samples, "val": samples // 7, "test": samples // 4}.items()
    }
    return Manifest((ClassInfo("a", samples), ClassInfo("b", samples)), splits)


@pytest.mark.parametrize("file", FINETUNE, ids=lambda file: file.stem)
def test_a_recipe_opens_with_its_command_time_and_result_and_can_be_trained_there(file: Path, tmp_path: Path) -> None:
    first, *lines = header(file)
    (command,) = [line for line in lines if line.startswith(("dist-train ", "deepspeed ", "launch/"))]
    assert [line.partition(":")[0] for line in lines if re.match("(Time|Result): ", line)] == ["Time", "Result"]
    words = shlex.split(command)
    assert find_recipe(words[words.index("--config") + 1]).samefile(file)
    recipe, _ = parse_recipe([*words[words.index("--config") :], f"--train.run={tmp_path / 'run'}"])
    (ranks,) = {ranks for where, ranks in RANKS.items() if where in first}
    # As small a set as the first line promises.
    samples = {"hundred": 300, "few thousand": 3000, "tens of thousands": 20_000, "a hundred thousand": 100_000}
    of = max((words for words in samples if words in first), key=len, default="few thousand")
    without_gpu = replace(recipe, data=replace(recipe.data, device="cpu"))
    assert not list(problems(without_gpu, ranks, "cuda", set_of(samples[of])))
    assert recipe.train.run != "runs/demo" and str(recipe.data.shards) in ("my_images/", "data/mine")


@pytest.mark.parametrize("file", FINETUNE, ids=lambda file: file.stem)
def test_its_model_is_built(file: Path) -> None:
    recipe, _ = parse_recipe([f"--config={file}", "--model.weights=none"])
    with torch.device("meta"):
        build_model(recipe.model, recipe.data.image_size, 43)


def test_runs_of_two_recipes_do_not_meet() -> None:
    runs = [yaml.safe_load(file.read_text())["train"]["run"] for file in FINETUNE]
    assert len(set(runs)) == len(runs) >= 6


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_path_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(["--config", "demo.yaml"])[0] == parse_recipe(["--config", "demo"])[0]
    assert parse_recipe(["--config=demo.yaml"])[0].train.run == "runs/demo"
    (tmp_path / "demo").mkdir()  # no recipe
    assert parse_recipe(["--config=demo"])[0] == recipe_from_python("demo", {})
    (tmp_path / "demo.yaml").write_text("train: {run: runs/mine}")
    assert parse_recipe(["--config=demo.yaml"])[0].train.run == "runs/mine"
    with pytest.raises(UseError, match="`dist-train recipes` lists those that come along"):
        parse_recipe(["--config=none.yaml"])

    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == own_recipes() and "paper/rows.yaml" not in listed
    assert {f"finetune/{file.name}" for file in FINETUNE} < set(listed)
    assert main(["recipes", "demo.yaml"]) == 0 and "runs/mine" in capsys.readouterr().out
    (tmp_path / "demo.yaml").unlink()
    assert main(["recipes", "demo"]) == 0
    assert capsys.readouterr().out == (RECIPES / "demo.yaml").read_text()
    assert main(["recipes", "none"]) == 2


def test_a_wheel_has_the_recipes_and_what_finds_them(tmp_path: Path) -> None:
    """Built from the files that git knows, as the checkout may hold others."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(lambda name: name and not name.startswith(("tests/", "benchmarks/")), names):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / "source" / name, follow_symlinks=False)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    words = [sys.executable, "-c", build, str(tmp_path)]
    built = subprocess.run(words, cwd=tmp_path / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1]) as wheel:
        inside = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    assert {f"dist_train/recipes/{name}" for name in own_recipes()} <= inside
    assert not any(name.startswith("launch/") for name in inside)
    words = [sys.executable, "-m", "dist_train.cli", "recipes"]
    where = {"PYTHONPATH": str(tmp_path / "installed"), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(words, cwd=tmp_path, env=where, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in said.splitlines()] == own_recipes()
