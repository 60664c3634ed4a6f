"""What is made of a run: which checkpoint is meant, on which set, what an export says, and runs that start runs."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dist_train.cli import main, recipe_from_run
from dist_train.config import ModelConfig
from dist_train.errors import UseError
from dist_train.models.build import Classifier, build_model, plain_weights
from dist_train.models.saved import (
    checkpoint_folder,
    list_checkpoints,
    read_averaged_weights,
    read_weights,
)
from dist_train.models.weights import LoadReport
from dist_train.train.record import start_console_log
from tests import harness
from tests.harness import CLASSES, jpeg_bytes, newest_weights, same, write_shard_set

NAMES = [f"class {i}" for i in range(CLASSES)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [30, 18], "val": [9], "test": [8]}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, baked=20)


def train(shards: Path, run: Path, **changes: object) -> Path:
    """A run of three epochs, or as the changes say."""
    assert harness.train(shards, run, **{"train__epochs": 3, **changes}) == 0
    return run


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints at 4, 8 and 12. So slow that accuracy stays what it was: the first that was evaluated is the best."""
    return train(shards, tmp_path_factory.mktemp("runs") / "run", optim__lr=1e-9, train__ema=0.3)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def ifa(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards, tmp_path_factory.mktemp("runs") / "ifa", model__head="ifa", train__stop_after_steps=1)


# ---------------------------------------------------------------------- which checkpoint
@pytest.mark.parametrize(
    ("options", "step", "why"),
    [
        ([], 4, "the best on val (top-1 "),
        (["--checkpoint", "best"], 4, "the best on val (top-1 "),
        (["--checkpoint", "last"], 12, "the last, the best on val is step 4"),
        (["--checkpoint", "8"], 8, "the best on val is step 4"),
        (["--checkpoint", "FOLDER"], 8, "given by its folder"),
        (["--ema"], 12, "the last, the best on val is step 4, averaged weights"),
        (["--ema", "--checkpoint", "best"], 4, "averaged weights"),
    ],
)
def test_the_checkpoint_that_is_meant_is_taken_and_named_with_its_step(
    run: Path, tmp_path: Path, capsys: Any, options: list[str], step: int, why: str
) -> None:
    options = [str(checkpoint_folder(run, 8)) if option == "FOLDER" else option for option in options]
    assert main(["export", str(run), str(tmp_path / "weights.safetensors"), *options]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{checkpoint_folder(run, step)}: step {step}, ") and why in line
    read = read_averaged_weights if "--ema" in options else read_weights
    exported, wanted = load_file(tmp_path / "weights.safetensors"), read(checkpoint_folder(run, step))
    assert torch.equal(exported["head.weight"], wanted["head.classifier.weight"])


def test_evaluate_predict_and_grid_take_the_same_checkpoint(run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "image.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    for command in (["evaluate", str(run)], ["grid", str(run)], ["predict", str(run), str(tmp_path / "image.jpg")]):
        for which, step in ((), 4), (("--checkpoint", "last"), 12):
            assert main([*command, *which]) == 0
            out, said = capsys.readouterr()
            assert said.startswith(f"{checkpoint_folder(run, step)}: step {step}, ")
            if command[0] == "evaluate":
                figures = json.loads(out)
                assert (figures["checkpoint"], figures["step"]) == (str(checkpoint_folder(run, step)), step)


@pytest.mark.parametrize("which", ["30", "0", "newest", "/no/such/folder"])
def test_a_checkpoint_that_is_not_there_is_one_line_that_names_those_that_are(
    run: Path, capsys: Any, which: str
) -> None:
    assert main(["evaluate", str(run), "--checkpoint", which]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --checkpoint {which}: ") and line.endswith("there are 4, 8, 12")
    assert "--resume" not in line


def test_where_the_best_is_lost_the_last_is_taken_with_a_warning_unless_it_was_asked_for(
    copy: Path, capsys: Any
) -> None:
    best = checkpoint_folder(copy, 4) / "weights.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    assert main(["evaluate", str(copy), "--checkpoint", "best"]) == 1
    assert "step-00000004, the best on val, cannot be used: weights.safetensors has" in capsys.readouterr().err
    start_console_log(0)
    for _ in range(2):
        assert main(["evaluate", str(copy)]) == 0
        said = capsys.readouterr().err.splitlines()
        assert "the best on val, cannot be used: " in said[-2] and ": step 12, the last" in said[-1]
        shutil.rmtree(checkpoint_folder(copy, 4), ignore_errors=True)


def test_a_run_without_val_has_no_best(ifa: Path, capsys: Any) -> None:
    assert main(["evaluate", str(ifa)]) == 0
    assert capsys.readouterr().err == f"{checkpoint_folder(ifa, 1)}: step 1, the last\n"
    assert main(["evaluate", str(ifa), "--checkpoint", "best"]) == 2
    assert "was never evaluated on val; use --checkpoint last" in capsys.readouterr().err


# ---------------------------------------------------------------------- which set
def test_a_set_that_was_built_anew_is_refused_unless_it_is_asked_for(shards: Path, tmp_path: Path, capsys: Any) -> None:
    own = shutil.copytree(shards, tmp_path / "set")
    run = train(own, tmp_path / "run", train__stop_after_steps=1)
    capsys.readouterr()
    assert main(["evaluate", str(run), "--shards", str(shards)]) == 0  # the same, elsewhere
    assert len(capsys.readouterr().err.splitlines()) == 1
    shutil.rmtree(own)
    write_shard_set(own, {"test": [9], "train": [30, 18], "val": [8]}, baked=20)  # first images of train are test now
    for command in ("evaluate", "grid"):
        assert main([command, str(run)]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: {own} is not the set any more that {run}") and f"--shards {own}" in said
        assert main([command, str(run), "--shards", str(own)]) == 0
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"warning: {own} is not the set that ") and "may have been trained on" in said


@pytest.mark.parametrize("command", ["evaluate", "grid"])
def test_a_split_without_samples_is_one_line(run: Path, tmp_path: Path, capsys: Any, command: str) -> None:
    empty = write_shard_set(tmp_path / "set", {"train": [30, 18], "test": []}, baked=20)
    assert main([command, str(run), "--shards", str(empty)]) == 1
    assert "holds no samples" in harness.error_line(capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_whose_images_a_gpu_decoded_is_used_on_a_machine_without_one(copy: Path) -> None:
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("device: auto", "device: gpu"))
    assert main(["evaluate", str(copy)]) == 0


# ---------------------------------------------------------------------- exports
def read_metadata(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
    return {key: json.loads(text) if text[:1] in '[{"0123456789n' else text for key, text in texts.items()}


def test_an_export_says_what_one_needs_to_use_it(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "new" / "weights.safetensors"
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), str(file)]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and os.listdir(file.parent) == [file.name]
    assert (
        "load into timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, num_classes=4)"
        in capsys.readouterr().out
    )
    known = read_metadata(file)
    assert known["classes"] == NAMES and known["image_size"] == 16 and known["head"] == "cls"
    assert known["mean"] == known["std"] == [0.5, 0.5, 0.5] and known["step"] == 4
    arguments = known["timm"]
    model = timm.create_model(arguments.pop("model"), **arguments)
    model.load_state_dict(load_file(file), strict=True)


def test_an_export_with_an_ifa_head_says_what_timm_can_take_of_it(ifa: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "weights.safetensors"
    assert main(["export", str(ifa), str(file)]) == 0
    said = capsys.readouterr().out
    assert "of the backbone load into timm.create_model('vit_tiny_patch16_224', img_size=16, patch_size=8, " in said
    assert "with strict=False" in said and "timm has no place for the other 6 (ifa.aggregate.bias, " in said
    arguments = read_metadata(file)["timm"]
    model = timm.create_model(arguments.pop("model"), **arguments)
    left = model.load_state_dict(load_file(file), strict=False)
    assert left.missing_keys == ["norm.weight", "norm.bias"]
    assert all(name.startswith("ifa.") for name in left.unexpected_keys) and len(left.unexpected_keys) == 6


# ---------------------------------------------------------------------- runs that start runs
def start_from(source: object, names: list[str] = NAMES, **config: Any) -> tuple[Classifier, LoadReport]:
    config = {"backbone": "vit_tiny_patch8", "weights": str(source), **config}
    return build_model(ModelConfig(**config), 16, len(names), class_names=names)


def test_a_run_or_a_checkpoint_gives_its_weights_and_its_head_for_the_same_classes(run: Path) -> None:
    best, last = checkpoint_folder(run, 4), checkpoint_folder(run, 12)
    for source, checkpoint, read in (
        (run, best, read_weights),
        (last, last, read_weights),
        (last / "weights.safetensors", last, read_weights),
        (f"{run}:ema", last, read_averaged_weights),
        (f"{best}:ema", best, read_averaged_weights),
        (best / "extra.safetensors", best, read_averaged_weights),
    ):
        model, report = start_from(source)
        assert same(model.state_dict(), read(checkpoint)), source
        assert f"{checkpoint}: step " in report.summary() and "with its classifier" in report.summary()
        assert ("averaged weights of" in report.summary()) == (read is read_averaged_weights)


def test_other_classes_get_a_new_head_also_where_they_are_as_many(run: Path, tmp_path: Path) -> None:
    main(["export", str(run), str(tmp_path / "export.safetensors")])
    for names in (["a", "b", "c", "d", "e"], NAMES[::-1]):
        for source in (run, tmp_path / "export.safetensors"):
            model, report = start_from(source, names)
            assert f"without its classifier, of 4 classes that are not the {len(names)} here" in report.summary()
            assert set(report.new) == {"head.weight", "head.bias"}
            assert not model.head.classifier.weight.any()
            weights = read_weights(checkpoint_folder(run, 4))
            assert torch.equal(model.backbone.norm.weight, weights["backbone.norm.weight"])


def test_heads_of_either_kind_start_each_other(run: Path, ifa: Path) -> None:
    model, report = start_from(ifa, head="ifa")
    assert same(model.state_dict(), newest_weights(ifa)) and not report.new
    model, report = start_from(ifa, NAMES[::-1], head="ifa")  # what does not depend on the classes comes along
    assert set(report.new) == {"ifa.classifier.weight", "ifa.classifier.bias"}
    for source, head in ((run, "ifa"), (ifa, "cls")):
        model, report = start_from(source, head=head)
        assert "without its classifier, of another head" in report.summary()
        wanted = read_weights(checkpoint_folder(source, 4 if source == run else 1))
        assert torch.equal(model.backbone.pos_embed, wanted["backbone.pos_embed"])


def test_a_cnns_run_starts_a_run_and_says_so(shards: Path, tmp_path: Path, capsys: Any) -> None:
    options = {"model__backbone": "resnet18", "data__image_size": 32, "train__stop_after_steps": 1}
    sharp = write_shard_set(tmp_path / "set", {"train": [24]}, size=(36, 36))
    first = train(sharp, tmp_path / "first", **options)
    second = train(sharp, tmp_path / "second", **options, optim__lr=0, model__weights=first)
    said = capsys.readouterr().err
    assert f"weights {first}: " in said and ": step 1, the last, with its classifier" in said
    one, other = (newest_weights(run) for run in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one if "running" not in name and "num_" not in name)
    assert recipe_from_run(second).model.weights == str(first)
    model, _ = build_model(ModelConfig(backbone="resnet18", weights=str(first)), 32, CLASSES, class_names=NAMES)
    assert plain_weights(model).keys() >= {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (lambda run, empty: empty, "is neither a run's folder nor a checkpoint's"),
        (lambda run, empty: f"{empty / 'weights.safetensors'}:ema", ":ema goes behind the folder of a run"),
        (lambda run, empty: empty / "nothing", "the folder of a run or checkpoint"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    run: Path, tmp_path: Path, source: Callable[[Path, Path], object], said: str
) -> None:
    with pytest.raises(UseError, match=said):
        start_from(source(run, tmp_path))


def test_averaged_weights_that_there_are_not_are_refused(ifa: Path) -> None:
    with pytest.raises(UseError, match="holds no averaged weights"):
        start_from(f"{ifa}:ema", head="ifa")
    assert len(list_checkpoints(ifa)) == 1
