"""Recipes: every key, every override, every mistake answered in one line."""

from __future__ import annotations

import ast
import inspect
import itertools
import shlex
from pathlib import Path

import pytest
import yaml

from dist_train import config
from dist_train.cli import KNOWN_KEYS, main, parse_recipe
from dist_train.errors import UseError
from dist_train.models.build import build_model
from tests.conftest import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
ROWS = yaml.safe_load((REPOSITORY / "launch" / "recipes" / "paper" / "rows.yaml").read_text())


def test_the_command_line_wins_over_the_file_and_later_files_over_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim: {lr: 0.1, momentum: 0.5}\ntrain: {batch_size: 8}\n")
    second.write_text("optim: {lr: 0.2}\n")
    recipe, resume = parse_recipe(
        ["--config", str(first), f"--config={second}", "--train.batch_size", "16", "--resume", "auto"]
    )
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.train.batch_size, resume) == (0.2, 0.5, 16, "auto")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--optim.lrr", "1"], "unknown recipe key 'optim.lrr'; the nearest known one is 'optim.lr'"),
        (["--model.haed=ifa"], "unknown recipe key 'model.haed'; the nearest known one is 'model.head'"),
        (["--optim.name", "adam"], "optim.name"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrate: 1}", "unknown recipe key 'optim.lrate'; the nearest known one is 'optim.lr"),
        ("optimiser: {lr: 1}", "unknown section 'optimiser'; the nearest known one is 'optim'"),
        ("- 1", "not a recipe"),
        ("a: [", "not YAML"),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UseError) as error:
        parse_recipe(["--config", str(path)])
    assert line in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def commands_in(path: Path) -> list[list[str]]:
    """The launch commands in the comment that opens a recipe."""
    comment = "\n".join(
        line.removeprefix("#").strip()
        for line in itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    )
    lines = comment.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith(("deepspeed ", "dist-train "))]


@pytest.mark.parametrize(
    "path", [*RECIPES, *sorted((RECIPES[0].parent / "paper").glob("table*.yaml"))], ids=lambda p: p.name
)
def test_each_recipe_opens_with_commands_that_resolve(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    commands = commands_in(path)
    assert commands
    for command in commands:
        arguments = command[command.index("--config") :]
        assert Path(arguments[1]).resolve() == path
        parse_recipe(arguments)


def test_rows_hold_every_cell_of_tables_1_to_6_and_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert {table: len(rows) for table, rows in ROWS.items()} == {
        "table1": 28,
        "table2": 40,
        "table3": 8,
        "table4": 12,
        "table5": 8,
        "table6": 10,
    }
    runs = [row["overrides"]["train.run"] for rows in ROWS.values() for row in rows]
    assert len(set(runs)) == len(runs)
    for table, rows in ROWS.items():
        for row in rows:
            overrides = [f"--{key}={value}" for key, value in row["overrides"].items()]
            recipe, _ = parse_recipe(["--config", f"launch/recipes/paper/{table}.yaml", *overrides])
            assert (recipe.optim.name, recipe.optim.lr, recipe.optim.momentum) == ("sgd", 0.001, 0.9)
            assert (recipe.optim.weight_decay, recipe.train.epochs, recipe.train.seed) == (0, 50, 0)
            assert recipe.optim.schedule == ("constant_epoch" if table in ("table1", "table2") else "cosine")
            assert recipe.model.head == ("ifa" if table in ("table5", "table6") else "cls")
            assert 0 < row["paper_top1"] < 100


def test_every_different_model_of_the_paper_is_built() -> None:
    import torch

    different = {}
    for table, rows in ROWS.items():
        for row in rows:
            overrides = [f"--{key}={value}" for key, value in row["overrides"].items() if key != "model.weights"]
            path = REPOSITORY / "launch" / "recipes" / "paper" / f"{table}.yaml"
            recipe, _ = parse_recipe(["--config", str(path), *overrides, "--model.weights=none"])
            different[(str(recipe.model), recipe.data.image_size)] = recipe
    with torch.device("meta"):
        for recipe in different.values():
            vocabulary = 30_522 if recipe.model.text_tokens else 0
            build_model(recipe.model, recipe.data.image_size, 3_263, vocabulary)


def test_help_says_what_each_key_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = "".join(capsys.readouterr().out.split())  # lines are broken anywhere
    meanings = [
        text.value.value
        for section in ast.parse(inspect.getsource(config)).body
        if isinstance(section, ast.ClassDef)
        for key, text in itertools.pairwise(section.body)
        if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]
    assert len(meanings) == len(KNOWN_KEYS)
    for meaning in meanings:
        assert "".join(meaning.split()) in said, meaning
