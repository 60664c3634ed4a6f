"""What the commands make of a run: evaluate, predict, export, grid, and models that read tags."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import dist_train
from dist_train.cli import main, parse_recipe
from dist_train.data.images import FORMATS
from dist_train.models.build import build_model
from tests import harness
from tests.harness import CLASSES, IFA, evaluations, jpeg_bytes, newest_weights, same
from tests.train.conftest import SPLITS

TEST = sum(SPLITS["test"])
arguments, train = (partial(function, **IFA) for function in (harness.arguments, harness.train))


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, f"dist-train {dist_train.__version__}\n")


def test_evaluate_writes_a_class_table_that_adds_up(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--split", "test"]) == 0
    figures = json.loads(capsys.readouterr().out)
    logged = next(e for e in evaluations(finished) if e["split"] == "test")
    assert (figures["samples"], figures["top1"]) == (TEST, logged["top1"])
    rows = list(csv.DictReader(open(figures["csv"])))
    assert len(rows) == CLASSES and sum(int(row["samples"]) for row in rows) == TEST
    assert sum(int(row["correct"]) for row in rows) == round(logged["top1"] * TEST)
    assert figures["class_mean_top1"] == pytest.approx(
        sum(int(row["correct"]) / int(row["samples"]) for row in rows) / CLASSES
    )


def test_predict_answers_good_files_and_names_bad_ones(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.new("L", (30, 20), 77).save(tmp_path / "grey.png")
    files = [str(tmp_path / name) for name in ("bad.jpg", "good.jpg", "none.jpg", "grey.png")]
    assert main(["predict", str(finished), *files]) == 1
    out, error = capsys.readouterr()
    assert error.splitlines()[1:] == [  # the first names the checkpoint
        f"{files[0]}: not an image that can be used (not an image: none of the formats {', '.join(FORMATS)})",
        f"{files[2]}: No such file or directory",
    ]
    blocks = [block for block in out.split(str(tmp_path)) if block]
    assert len(blocks) == 2
    for block in blocks:
        probabilities = [float(line.split()[0]) for line in block.splitlines()[1:]]
        assert len(probabilities) == CLASSES and sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert probabilities == sorted(probabilities, reverse=True)
    assert main(["predict", str(finished), files[1]]) == 0


def test_exported_weights_load_into_timms_model(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(shards, run, model__head="cls", train__stop_after_steps=2) == 0
    assert main(["export", str(run), str(tmp_path / "weights.safetensors")]) == 0
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES, pretrained=False)
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    ours, _ = build_model(parse_recipe(arguments(shards, run, model__head="cls"))[0].model, 16, CLASSES)
    ours.load_state_dict(newest_weights(run))
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(model.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_grid_of_predictions_is_a_picture(finished: Path) -> None:
    assert main(["grid", str(finished)]) == 0
    assert Image.open(finished / "predictions.png").size[0] == 8 * 128


def test_a_vilt_trains_evaluates_and_predicts_with_tags(
    shards: Path, shared_data: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    vocabulary = shared_data / "text" / "bert-base-uncased-vocab.txt"
    options = {"model__text_tokens": 16, "data__tokenizer": vocabulary, "train__epochs": 1}
    assert train(shards, run, **options) == 0
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    capsys.readouterr()
    answers = []
    for tags in ("red hair smile", "cat ears " * 6):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), "--tags", tags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_a_vilt_of_whole_tags_keeps_its_vocabulary_in_the_run_folder(shards: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    options = {"model__text_tokens": 4, "data__tokenizer": "tags", "data__tag_order": "frequency"}
    assert train(shards, run, train__stop_after_steps=3, **options) == 0
    vocabulary = (run / "tags.txt").read_text()
    assert vocabulary == "hair\nred\nsmile\ncat\nears\n"
    edited = vocabulary.replace("hair\nred\n", "red\nhair\n")
    (run / "tags.txt").write_text(edited)
    assert train(shards, run, resume="auto", **options) == 0
    assert (run / "tags.txt").read_text() == edited  # a run that goes on keeps its tags
    (logged,) = [entry for entry in evaluations(run) if entry["split"] == "test"]
    capsys.readouterr()
    assert main(["evaluate", str(run), "--split", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == logged["top1"]
    (tmp_path / "good.jpg").write_bytes(jpeg_bytes(3, 20, 20))
    answers = []
    for tags in ("red hair smile", "smile hair red", "cat ears"):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), "--tags", tags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    # Tags are separated as they are beside images: "red hair" is one here, and the model knows no such.
    for tags, warning in (
        ([], "the model reads tags and is given none"),
        (["--tags", "red hair, cat ears"], "the model knows none of the tags 'red_hair cat_ears'"),
        (["--tags", "red hair, smile"], ""),
        (["--tags", " smile,,red"], ""),
    ):
        assert main(["predict", str(run), str(tmp_path / "good.jpg"), *tags]) == 0
        error = capsys.readouterr().err
        assert error.count("warning: ") == bool(warning) and warning in error
    other = tmp_path / "other"  # goes on from the first one's checkpoint, and so by its tags
    assert train(shards, other, resume=str(run / "checkpoints" / "step-00000004"), **options) == 0
    assert (other / "tags.txt").read_text() == edited and same(newest_weights(other), newest_weights(run))
    (run / "tags.txt").unlink()
    assert main(["evaluate", str(run), "--split", "test"]) == 1
    assert "tags.txt: cannot be read" in capsys.readouterr().err
