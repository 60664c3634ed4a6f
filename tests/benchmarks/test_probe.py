"""The probe on frozen features: they are the blocks' tokens, its fit is ridge regression, its error is paired."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks import result
from benchmarks.__main__ import main
from benchmarks.claims import probe
from dist_train.config import DataConfig
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.place import Place

NAMES = ["final [CLS]", "mean of all [CLS]", "last four [CLS]", "all [CLS]", "all [CLS] and averages"]


def test_the_probe_is_ridge_regression_with_the_ridge_that_val_prefers() -> None:
    draw = np.random.default_rng(0)
    labels = {split: draw.integers(0, 3, 40) for split in probe.SPLITS}
    centres = draw.standard_normal((3, 5))
    features = {
        split: (centres[its] + 1.2 * draw.standard_normal((40, 5)) + 7).astype(np.float32)
        for split, its in labels.items()
    }
    found = probe.fit(features, labels, classes=3)
    # The normal equations of the same problem, in the space of the features; the intercept is not shrunk.
    x = features["train"].astype(np.float64)
    y = np.eye(3)[labels["train"]]
    centred = x - x.mean(axis=0)
    unit = (centred**2).sum(axis=1).mean()
    right = {}
    for ridge in probe.RIDGES:
        weights = np.linalg.solve(centred.T @ centred + ridge * unit * np.eye(5), centred.T @ (y - y.mean(axis=0)))
        right[ridge] = {
            split: ((features[split] - x.mean(axis=0)) @ weights + y.mean(axis=0)).argmax(axis=1) == labels[split]
            for split in ("val", "test")
        }
    best = max(its["val"].mean() for its in right.values())
    chosen = max(ridge for ridge, its in right.items() if its["val"].mean() == best)
    assert found.ridge == chosen and found.val_top1 == best < 1
    np.testing.assert_array_equal(found.right, right[chosen]["test"])


def test_the_standard_error_is_that_of_the_difference_sample_by_sample() -> None:
    first, other = np.array([1, 1, 0, 0], np.bool_), np.array([1, 0, 1, 1], np.bool_)
    row = probe.Probe(0.1, 0.5, other).row(first)
    assert (row["test_top1"], row["points"]) == (75, 25)
    assert row["standard_error"] == pytest.approx(100 * np.std([0, -1, 1, 1], ddof=1) / 2, abs=0.01)


def test_the_features_are_the_blocks_tokens_through_the_final_norm(
    tmp_path: Path, shard_set: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(result, "RESULTS", tmp_path / "results")
    shards = shard_set({"train": [24], "val": [8], "test": [12]}, size=(40, 40))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).eval()
    with torch.no_grad():
        for parameter in model.norm.parameters():
            parameter.uniform_(0.5, 1.5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    words = ["probe", str(shards), "--weights", str(tmp_path / "w.safetensors"), "--backbone", "vit_tiny_patch16_224"]
    words += ["--name", "small", "--features", str(tmp_path / "f.npz")]
    assert main([*words, "--size", "32"]) == 0, capfd.readouterr().err
    with np.load(tmp_path / "f.npz") as file:
        tokens, labels = file["test_tokens"], file["test_labels"]
    assert tokens.shape == (12, 2, 12, 192)
    outputs: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: outputs.append(call[2]))
    config = DataConfig(str(shards), image_size=32)  # 0.5 and 0.5 are these weights' own mean and deviation
    (batch,) = EvalLoader(config, read_manifest(shards), "test", Place(), batch_size=12)
    with torch.no_grad():
        model(batch.images)
        for i, output in enumerate(outputs):
            cls, average = output[:, 0], output[:, 1:].sum(dim=1) / 4
            for kind, token in enumerate((cls, average)):
                np.testing.assert_allclose(tokens[:, kind, i], model.norm(token), atol=1e-4)
    np.testing.assert_array_equal(labels, batch.labels)

    document = json.loads((tmp_path / "results/probe/small.json").read_bytes())
    assert [row["features"] for row in document["rows"]] == NAMES
    assert [row["numbers"] for row in document["rows"]] == [192, 192, 768, 2304, 4608]
    assert document["rows"][0]["points"] == document["rows"][0]["standard_error"] == 0
    assert document["parameters"]["test"] == 12
    assert probe.headline(document).startswith("final [CLS]: ")

    (tmp_path / "results/probe/small.json").unlink()
    monkeypatch.setattr(probe, "frozen_vit", None)  # what the file has is not computed again
    assert main([*words, "--size", "32"]) == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "results/probe/small.json").read_bytes())["rows"] == document["rows"]
    assert main([*words, "--size", "48"]) == 2
    assert "f.npz is of other images, weights or sizes; name another" in capfd.readouterr().err


def test_what_a_probe_needs_is_said(tmp_path: Path, shard_set: Any, capfd: pytest.CaptureFixture[str]) -> None:
    shards = shard_set({"train": [4], "test": [4]})
    (tmp_path / "w.safetensors").touch()
    assert main(["probe", str(shards), "--weights", str(tmp_path / "none.pth"), "--name", "x"]) == 2
    assert "there is no file" in capfd.readouterr().err
    assert main(["probe", str(shards), "--weights", str(tmp_path / "w.safetensors"), "--name", "x"]) == 2
    assert "has no split val" in capfd.readouterr().err
