"""Recipes: every key, every override, every mistake answered in one line."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from dist_train import config, synonyms
from dist_train.cli import main, parse_recipe
from dist_train.errors import UseError
from dist_train.models.build import build_model
from dist_train.parse import KNOWN_KEYS, PATH_KEYS, recipe_from_run
from dist_train.ranges import check_ranges, ranges_of
from tests.harness import REPOSITORY

RANGES = {
    f"{name}.{key}": allowed for name, kind in config.SECTIONS.items() for key, allowed in ranges_of(kind).items()
}

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
        (["--optim.lrr", "1"], "unknown recipe key 'optim.lrr'; did you mean optim.lr?"),
        (["--model.haed=ifa"], "unknown recipe key 'model.haed'; did you mean model.head?"),
        (["--optim.name", "adam"], "optim.name"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read"),
        (["--frobnicate"], "unknown option '--frobnicate'"),
        (["--confg", "mine.yaml"], "unknown option '--confg'; did you mean --config?"),
        (["--dry_run"], "unknown option '--dry_run'; did you mean --dry-run?"),
        (["--data.mean="], "data.mean: Expected list in brackets, as [0.1,0.2] or one of 'auto'. Got value: "),
        (["--dry-run=true"], "--dry-run takes no value"),
        (["mine.yaml"], "a recipe is given as --config mine.yaml"),
        (["--optim", "{lr: 1}"], "--optim is a section"),
        (["--optim.lr"], "--optim.lr needs a value"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrate: 1}", "unknown recipe key 'optim.lrate'; here it is optim.lr"),
        ("optimiser: {lr: 1}", "unknown section 'optimiser'; here it is optim"),
        ("lr: 1", "unknown section 'lr'; it is optim.lr"),
        ("frobs: {lr: 1}", "unknown section 'frobs'; there are data, model, optim, train, deepspeed"),
        ("optim: 1", "'optim' is a section"),
        ("data: {mean: .5}", "data.mean"),
        ("data: {mean: &m [*m]}", "data.mean"),
        ("optim: {lr: {lr: 1}}", "optim.lr"),
        ("optim: {lr: .nan}", "optim.lr is nan; it must be a finite number"),
        ("train: {micro_batch_size: atuo}", "train.micro_batch_size: Expected int or one of 'auto'. Got value: atuo"),
        ("optim: {name: adam}", "optim.name: Expected one of 'sgd', 'adamw'. Got value: adam"),
        ("- 1", "not a recipe"),
        ("a: [", "not YAML"),
        (
            "data:\n\tflip: true",
            ", line 2: not YAML (found character '\\t' that cannot start any token); indent with blanks",
        ),
        (
            "data:\n  flip: true\n hue: 0",
            ", line 3: not YAML (expected <block end>, but found '<block mapping start>'); is it",
        ),
    ],
)
def test_mistakes_in_the_file_name_the_file(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UseError) as error:
        parse_recipe(["--config", str(path)])
    assert line in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def read(tmp_path: Path, text: str, *arguments: str) -> config.Recipe:
    """The recipe of a file with that text, and of the arguments."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return parse_recipe(["--config", str(path), *arguments])[0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim:\n  name: adamw\n  lr: 0.1\n  name: sgd\n", ", line 4: 'name' is there already, in line 2"),
        ("optim: {lr: 1}\ndata: {}\noptim: {lr: 2}\n", ", line 3: 'optim' is there already, in line 1"),
        ("optim: {lr: 1, 'lr': 1}\n", ", line 1: 'lr' is there already"),
        ("data:\n  mean:\n  - {a: 1,\n     a: 2}\n", ", line 4: 'a' is there already, in line 3"),
        ("data:\n  <<: {hue: 0.1}\n  <<: {hue: 0.2}\n", ", line 3: '<<' is there already"),
    ],
)
def test_a_repeated_key_or_section_is_refused_with_file_line_and_key(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UseError) as error:
        read(tmp_path, text)
    assert f"{tmp_path / 'recipe.yaml'}{line}" in str(error.value) and "\n" not in str(error.value)


def test_anchors_and_merged_mappings_whose_keys_are_given_anew_are_no_repetition(tmp_path: Path) -> None:
    text = (
        "data: {<<: [&jitter {hue: 0.2, contrast: 0.3}, {hue: 0.4, flip: false}], contrast: 0.0}\n"
        "model: {freeze: &n 3}\n"
        "train: {epochs: *n}\n"
    )
    recipe = read(tmp_path, text)
    assert (recipe.data.hue, recipe.data.contrast, recipe.data.flip) == (0.2, 0.0, False)
    assert (recipe.model.freeze, recipe.train.epochs) == ("3", 3)


def test_text_stays_as_written_and_numbers_may_be_in_any_usual_form(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: {freeze: 3}\ndata: {digest: 0123, shards: 2024}\noptim: {lr: 1e-3}\n")
    assert (recipe.model.freeze, recipe.data.digest, recipe.data.shards) == ("3", "0123", "2024")
    assert recipe.optim.lr == 0.001
    assert parse_recipe(["--model.freeze", "3"])[0].model.freeze == "3"
    none = read(
        tmp_path, "data: {cache: none, digest: null}\ntrain: {wandb_project: None}\n", "--deepspeed.config=none"
    )
    assert (none.data.cache, none.data.digest, none.train.wandb_project, none.deepspeed.config) == (None,) * 4


def test_home_and_variables_are_expanded_in_paths_and_urls_from_files_and_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("BUCKET", "mine")
    given = {
        "data.shards": ("s3://$BUCKET/set", "s3://mine/set"),
        "data.cache": ("~/cache", "/home/ann/cache"),
        "data.feature_cache": ("~/features", "/home/ann/features"),
        "data.tokenizer": ("$HOME/vocab.txt", "/home/ann/vocab.txt"),
        "model.weights": ("~/w$$.pth", "/home/ann/w$.pth"),
        "train.run": ("${HOME}/runs/$BUCKET", "/home/ann/runs/mine"),
        "deepspeed.config": ("~/ds.json", "/home/ann/ds.json"),
    }
    assert set(given) == set(PATH_KEYS)
    document: dict[str, dict[str, str]] = {}
    for key, (written, _) in given.items():
        section, _, name = key.partition(".")
        document.setdefault(section, {})[name] = written
    from_file = read(tmp_path, yaml.safe_dump(document))
    from_words, resume = parse_recipe([*(f"--{key}={written}" for key, (written, _) in given.items()), "--resume=~/c"])
    assert resume == "/home/ann/c"
    for key, (_, path) in given.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(from_file, section), name) == getattr(getattr(from_words, section), name) == path


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("$NOT_SET/set", "the variable NOT_SET is not set, or empty"),
        ("${EMPTY}/set", "the variable EMPTY is not set, or empty"),
        ("${HOME:-x}/set", "${HOME:-x} cannot be expanded"),
        ("${HOME/set", "${HOME/set cannot be expanded"),
        (" ", "is empty"),
        ("~nosuchuserhere/set", "no home folder is known for ~nosuchuserhere"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, line: str
) -> None:
    monkeypatch.setenv("EMPTY", "")
    for words in (["--data.shards", path], ["--config", str(tmp_path / "recipe.yaml")]):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"shards": path}}))
        with pytest.raises(UseError) as error:
            parse_recipe(words)
        assert "data.shards" in str(error.value) and path in str(error.value) and line in str(error.value)


def test_a_runs_own_recipe_is_not_expanded_again(tmp_path: Path) -> None:
    recipe = config.Recipe(data=config.DataConfig(shards="/data/$x/~y"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"shards": recipe.data.shards}}))
    assert recipe_from_run(tmp_path).data.shards == "/data/$x/~y"


def numbers_of_a_recipe() -> dict[str, object]:
    """Every key that holds a number or several, with its default."""
    sections = {field.name: getattr(config.Recipe(), field.name) for field in fields(config.Recipe)}
    values = {
        f"{section}.{key}": value for section, entries in sections.items() for key, value in asdict(entries).items()
    }
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    }


def test_every_number_of_a_recipe_has_a_range_that_holds_its_default() -> None:
    assert set(RANGES) == set(numbers_of_a_recipe())
    check_ranges(config.Recipe())


@pytest.mark.parametrize("key", sorted(RANGES))
def test_a_number_out_of_its_range_is_refused_in_one_line(key: str) -> None:
    allowed, default = RANGES[key], numbers_of_a_recipe()[key]
    wrong = [
        allowed.least if allowed.above else allowed.least - 1,
        allowed.most if allowed.below else allowed.most * 2 + 1,
    ]
    wrong = [value for value in wrong if math.isfinite(value)]
    if not isinstance(default, int):
        wrong += [math.nan, math.inf, -math.inf]
    assert wrong
    for value in wrong:
        section, _, name = key.partition(".")
        given = (value, *default[1:]) if isinstance(default, tuple) else type(default)(value)
        recipe = config.Recipe()
        setattr(getattr(recipe, section), name, given)
        with pytest.raises(UseError, match=f"^{key} is ") as error:
            check_ranges(recipe)
        assert "must be" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--optim.lr -1", "optim.lr is -1.0; it must be at least 0"),
        ("--train.batch_size=0", "train.batch_size is 0; it must be at least 1"),
        ("--optim.warmup_steps -1", "optim.warmup_steps is -1; it must be at least 0"),
        ("--optim.betas [0.9,1.0]", "optim.betas is [0.9, 1.0]; each of them must be at least 0 and below 1"),
        ("--optim.lr .inf", "optim.lr is inf; it must be a finite number"),
    ],
)
def test_a_wrong_number_ends_the_command_with_one_line(
    command: str, words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *words.split()]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("optim.learning_rate", "here it is optim.lr"),
        ("train.lr", "it is optim.lr"),
        ("wd", "here it is optim.weight_decay"),
        ("train.num_train_epochs", "here it is train.epochs"),
        ("trainer.max_epochs", "here it is train.epochs"),
        ("train.per_device_train_batch_size", "here it is train.micro_batch_size"),
        ("train.gradient_accumulation_steps", "accumulation follows from train.batch_size"),
        ("trainer.accumulate_grad_batches", "accumulation follows from train.batch_size"),
        ("train.fp16", "here it is deepspeed.precision"),
        ("amp", "here it is deepspeed.precision"),
        ("optim.warmup_ratio", "is given in steps: optim.warmup_steps"),
        ("optim.warmup_epochs", "optim.warmup_steps"),
        ("model.drop_path_rate", "here it is model.drop_path"),
        ("optim.smoothing", "here it is optim.label_smoothing"),
        ("train.model_ema_decay", "here it is train.ema"),
        ("optim.clip_grad", "here it is optim.clip_norm"),
        ("optim.max_grad_norm", "here it is optim.clip_norm"),
        ("train.output_dir", "here it is train.run"),
        ("train.early_stop", "here it is train.patience"),
        ("train.early_stopping", "here it is train.patience"),
        ("train.metric_for_best_model", "here it is train.monitor"),
        ("data.num_workers", "here it is data.threads"),
        ("data.workers", "here it is data.threads"),
        ("trainer.devices", "the number of ranks is the launcher's"),
        ("data.batch-size", "it is train.batch_size"),
        ("optim.Lr", "write optim.lr"),
        ("model.name", "here it is model.backbone"),
        ("model.patch_size", "it is in the name of model.backbone"),
        ("model.heads", "did you mean model.head?"),
        ("train.push_to_hub", "`dist-train export RUN --hub USER/NAME` does"),
        ("train.fast_dev_run", "`dist-train train --dry-run` makes a few steps"),
        ("train.dry_run", "`dist-train train --dry-run`"),
    ],
)
def test_a_key_of_other_trainers_is_answered_with_what_it_is_here(key: str, advice: str) -> None:
    with pytest.raises(UseError) as error:
        parse_recipe([f"--{key}", "1"])
    assert advice in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["train.verbose", "model.fancy", "data.resize_mode", "optim.power", "zzz", "x.y.z"])
def test_a_key_like_none_is_answered_with_no_guess(key: str) -> None:
    with pytest.raises(UseError) as error:
        parse_recipe([f"--{key}", "1"])
    assert ";" not in str(error.value)


def test_the_table_of_synonyms_names_keys_that_there_are_and_each_word_once() -> None:
    assert set(synonyms.KEYS) <= set(KNOWN_KEYS) and set(synonyms.SECTIONS) == set(config.SECTIONS)
    words = [
        word for line in [*synonyms.KEYS.values(), *(words for words, _ in synonyms.SENTENCES)] for word in line.split()
    ]
    assert len(words) == len(set(words))
    named = re.findall(
        r"\b(?:data|model|optim|train|deepspeed)\.[a-z_]+", " ".join(sentence for _, sentence in synonyms.SENTENCES)
    )
    assert set(named) - {"train.py"} <= set(KNOWN_KEYS)


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
