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


@pytest.mark.parametrize("numbers", [5, 60])  # fewer than samples, and more
def test_the_probe_is_ridge_regression_with_the_ridge_that_val_prefers(numbers: int) -> None:
    draw, noise = np.random.default_rng(0), 1.2 * (numbers / 5) ** 0.5
    labels = {split: draw.integers(0, 3, 40) for split in probe.SPLITS}
    centres = draw.standard_normal((3, numbers))
    features = {
        split: (centres[its] + noise * draw.standard_normal((40, numbers)) + 7).astype(np.float32)
        for split, its in labels.items()
    }
    found = probe.fit(features, labels, classes=3)
    right = {}
    for ridge in probe.RIDGES:
        told = normal_equations(features["train"], labels["train"], ridge, features["val"])
        right[ridge] = float((told == labels["val"]).mean())
    chosen = max(ridge for ridge, top1 in right.items() if top1 == max(right.values()))
    assert found.ridge == chosen and found.val_top1 == right[chosen] < 1
    both = (np.concatenate([its["train"], its["val"]]) for its in (features, labels))
    told = normal_equations(*both, chosen, features["test"])
    np.testing.assert_array_equal(found.right, told == labels["test"])


def normal_equations(known: np.ndarray, labels: np.ndarray, ridge: float, asked: np.ndarray) -> np.ndarray:
    """The same problem in the space of the features, whose column of ones is not shrunk."""
    x = np.hstack([known, np.ones((len(known), 1))]).astype(np.float64)
    centred = known - known.mean(axis=0)
    shrink = ridge * np.square(centred, dtype=np.float64).sum(axis=1).mean() * np.diag([*[1.0] * known.shape[1], 0])
    weights = np.linalg.solve(x.T @ x + shrink, x.T @ np.eye(3)[labels])
    return (np.hstack([asked, np.ones((len(asked), 1))]) @ weights).argmax(axis=1)


def test_the_standard_error_is_that_of_the_difference_sample_by_sample() -> None:
    first, other = np.array([1, 1, 0, 0], np.bool_), np.array([1, 0, 1, 1], np.bool_)
    row = probe.Probe(0.1, 0.5, other).row(first)
    assert (row["test_top1"], row["points"]) == (75, 25)
    assert row["standard_error"] == pytest.approx(100 * np.std([0, -1, 1, 1], ddof=1) / 2, abs=0.01)


def test_the_features_are_the_blocks_tokens(
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
        tokens, labels, norm = file["test_tokens"], file["test_labels"], file["norm"]
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
                np.testing.assert_allclose(tokens[:, kind, i], token, atol=1e-4)
                np.testing.assert_allclose(probe.layer_norm(tokens[:, kind, i], norm), model.norm(token), atol=1e-4)
        final, mean = model.norm(outputs[-1][:, 0]), model.norm(sum(its[:, 0] for its in outputs) / 12)
    np.testing.assert_array_equal(labels, batch.labels)
    sets = probe.feature_sets(tokens, norm)
    np.testing.assert_allclose(sets["final [CLS]"], final, atol=1e-4)
    np.testing.assert_allclose(sets["mean of all [CLS]"], mean, atol=1e-4)
    np.testing.assert_allclose(sets["last four [CLS]"][:, -192:], final, atol=1e-4)

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
    for content in (b"no archive", (tmp_path / "f.npz").read_bytes()[:-100]):
        (tmp_path / "f.npz").write_bytes(content)
        assert main([*words, "--size", "32"]) == 2
        assert "f.npz cannot be read (" in capfd.readouterr().err


def test_a_backbone_that_cannot_be_is_one_line(
    tmp_path: Path, shard_set: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = shard_set({"train": [4], "val": [4], "test": [4]})
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    for backbone, size, said in (
        ("no_such", 32, "Unknown model"),
        ("resnet10t", 32, "img_size"),
        ("vit_tiny_patch16_224", 32, "loading state_dict"),
        ("test_vit", -3, "positive image size"),
    ):
        words = ["probe", str(shards), f"--weights={tmp_path / 'w.safetensors'}", "--name=x", f"--size={size}"]
        assert main([*words, f"--backbone={backbone}"]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --backbone {backbone}, --weights ") and said in error


def test_what_a_probe_needs_is_said(tmp_path: Path, shard_set: Any, capfd: pytest.CaptureFixture[str]) -> None:
    shards = shard_set({"train": [4], "test": [4]})
    (tmp_path / "w.safetensors").touch()
    assert main(["probe", str(shards), "--weights", str(tmp_path / "none.pth"), "--name", "x"]) == 2
    assert "there is no file" in capfd.readouterr().err
    assert main(["probe", str(shards), "--weights", str(tmp_path / "w.safetensors"), "--name", "x"]) == 2
    assert "has no split val" in capfd.readouterr().err
