"""What training refuses in one line, before it begins, and what it says of data that is not as one would wish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_train.cli import main
from dist_train.data.manifest import read_manifest, write_manifest
from tests import harness
from tests.harness import IFA, error_line, write_shard_set
from tests.train.conftest import SPLITS

train = partial(harness.train, **IFA)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__backbone": "vit_tiny_patch7"}, "image_size"),
        ({"model__backbone": "resnet19"}, "resnet18"),
        ({"train__epochs": 0}, "train.epochs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_one_line_and_exit_2(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: dict[str, object], line: str
) -> None:
    """What test_recipe_check.py does not have."""
    capsys.readouterr()
    assert train(shards, tmp_path / "run", **overrides) == 2
    assert line in error_line(capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_incomplete_set_is_refused(shard_set: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    root = shard_set({"train": [8]})
    (root / "manifest.json").unlink()
    assert train(root, tmp_path / "run") == 2
    assert "no manifest.json, so this is no complete shard set" in capsys.readouterr().err
    (root / "manifest.json").mkdir()
    assert train(root, tmp_path / "run") == 1
    assert error_line(capsys.readouterr().err).endswith("manifest.json: cannot be read (Is a directory)")


def test_text_asked_of_shards_without_tags_is_refused(
    shard_set: Callable[..., Path], shared_data: Path, tmp_path: Path, capsys: Any
) -> None:
    root = shard_set({"train": [24]}, baked=20)
    vocabulary = shared_data / "text" / "bert-base-uncased-vocab.txt"
    assert train(root, tmp_path / "run", model__text_tokens=16, data__tokenizer=vocabulary, optim__warmup_steps=0) == 2
    assert "model.text_tokens asks for tags, but the shard set" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_other_data_is_not_resumed(
    finished: Path, shards: Path, shard_set: Callable[..., Path], capsys: Any
) -> None:
    assert train(shards, finished) == 2
    assert "already holds a run; add --resume auto" in capsys.readouterr().err
    other = shard_set(SPLITS | {"test": [9]}, baked=20)
    assert train(other, finished, resume="auto") == 2
    assert "manifest digest of the shard set was" in capsys.readouterr().err
    more_classes = shard_set({"train": SPLITS["train"]}, name="more", baked=20, classes=6)
    assert train(more_classes, finished, resume="auto") == 2
    assert "classes of the shard set was 4, now it is 6" in capsys.readouterr().err
    assert main(["evaluate", str(finished), "--shards", str(more_classes), "--split", "train"]) == 2
    assert "has 6 classes" in capsys.readouterr().err
    assert train(shards, finished, resume="auto", train__seed=1) == 2
    assert "train.seed was 0, now it is 1" in capsys.readouterr().err


def test_classes_that_cannot_be_learnt_are_named_before_training(tmp_path: Path, capsys: Any) -> None:
    """The digest of a set from before that was written down is as it was, and its classes of no image are named."""
    root = write_shard_set(tmp_path / "set", {"train": [4], "val": [2]}, baked=20, classes=9)
    assert train(root, tmp_path / "run", train__epochs=1, train__batch_size=4, optim__warmup_steps=0) == 0
    assert (
        "3 of 9 classes have no training image and cannot be learnt: class 6, class 7, class 8"
        in capsys.readouterr().err
    )
    write_manifest(root, replace(read_manifest(root), untrained=(4, 5, 6, 7, 8)))
    assert train(root, tmp_path / "again", train__epochs=1, train__batch_size=4, optim__warmup_steps=0) == 0
    assert "5 of 9 classes have no training image" in capsys.readouterr().err
