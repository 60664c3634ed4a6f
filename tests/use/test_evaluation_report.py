"""What `dist-train evaluate` leaves beside its figures, held to scikit-learn and to the photos of the set."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from dist_train.cli import main
from dist_train.data.loader import EvalLoader
from dist_train.parse import recipe_from_run
from dist_train.train.pictures import confusion_picture
from dist_train.use.report import ClassScores, Outcomes, confused_page
from dist_train.use.trained import load_trained, set_to_look_at
from tests import harness
from tests.harness import CLASSES, jpeg_bytes, write_shard_set

BAD = 34
"""A sample of test that is no image."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    splits = {"train": [24], "val": [4], "test": [15, 8]}
    shards = write_shard_set(root / "set", splits, baked=20, replace={BAD: b"no image"})
    assert harness.train(shards, root / "run", train__epochs=2, optim__lr=0.05, data__max_bad_samples=1) == 0
    return root / "run"


@pytest.fixture(scope="module")
def truth(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of the usable samples of test, without the code that is tested."""
    trained = load_trained(run, recipe_from_run(run))
    data, manifest = set_to_look_at(trained, None)
    batches = list(EvalLoader(data, manifest, "test", trained.place, batch_size=23))
    usable = batches[0].weights > 0
    predicted = trained.forward(batches[0]).argmax(dim=1)
    return batches[0].labels[usable].numpy(), predicted[usable].numpy()


def evaluate(run: Path, capsys: Any, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(run), *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_classes_and_matrix_are_those_of_scikit_learn(
    run: Path, truth: tuple[np.ndarray, np.ndarray], capsys: Any
) -> None:
    figures = evaluate(run, capsys)
    labels = list(range(CLASSES))
    assert len(truth[0]) == 22 and figures["bad_samples"] == 1
    assert len(set(truth[1])) > 1 and (truth[0] != truth[1]).any()  # of a model that says one thing little is seen
    with open(figures["csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = precision_recall_fscore_support(*truth, labels=labels, zero_division=np.nan)
    for row, precision, recall, f1, count in zip(rows, *wanted, strict=True):
        found = [float(row[name]) if row[name] else np.nan for name in ("precision", "recall", "f1", "top1")]
        assert found == pytest.approx([precision, recall, f1, recall], abs=1e-4, nan_ok=True)
        assert int(row["samples"]) == count
    assert figures["macro_f1"] == pytest.approx(np.mean(wanted[2]))
    with open(figures["confusion"], newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["true class", *(f"class {i}" for i in labels)] and [line[0] for line in lines] == header[1:]
    assert np.array_equal([list(map(int, line[1:])) for line in lines], confusion_matrix(*truth, labels=labels))


def test_the_page_shows_the_most_confused_pairs_with_their_own_photos(
    run: Path, truth: tuple[np.ndarray, np.ndarray], capsys: Any
) -> None:
    page = Path(evaluate(run, capsys)["confused"]).read_text()
    counts = confusion_matrix(*truth, labels=range(CLASSES))
    np.fill_diagonal(counts, 0)
    sections = re.findall(
        r"<h2>class (\d) <i>taken for</i> class (\d)</h2><p>(\d+) of (\d+) samples</p><div>(.*?)</div>", page
    )
    assert {(int(a), int(b)): int(n) for a, b, n, _, _ in sections} == {
        (a, b): counts[a, b] for a in range(CLASSES) for b in range(CLASSES) if counts[a, b]
    }
    numbers = [int(n) for _, _, n, _, _ in sections]
    assert numbers == sorted(numbers, reverse=True)
    for true, _, _, _, figures in sections:
        shown = re.findall(r'base64,([^"]+)" alt=""><figcaption>test-0000\d\d\.tar:(\d+), (\d+)%<', figures)
        sure = [int(percent) for _, _, percent in shown]
        assert shown and sure == sorted(sure, reverse=True)
        for picture, key, _ in shown:
            assert int(key) % CLASSES == int(true) and int(key) != BAD
            found = pixels(base64.b64decode(picture))
            others = {n: np.abs(found - pixels(jpeg_bytes(n, 20, 20))).mean() for n in range(28, 51) if n != BAD}
            assert min(others, key=others.__getitem__) == int(key)


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int16)


def test_names_are_text_on_the_page(run: Path) -> None:
    hostile = "<script>alert('1')</script>"
    trained = load_trained(run, recipe_from_run(run))
    data, manifest = set_to_look_at(trained, None)
    infos = tuple(replace(info, name=f"{hostile}{i}") for i, info in enumerate(manifest.classes))
    outcomes = Outcomes(np.array([2]), np.array([2]), np.array([1]), np.array([0.5], np.float32))
    scores = ClassScores.of(outcomes, CLASSES)
    page = confused_page(data, replace(manifest, classes=infos), "test", outcomes, hostile, scores)
    assert page.count(html.escape(hostile)) == 4 and "<script" not in page


def test_files_go_beside_csv(run: Path, tmp_path: Path, capsys: Any) -> None:
    figures = evaluate(run, capsys, "--csv", str(tmp_path / "table.csv"))
    named = {figures[name] for name in ("csv", "confusion", "picture", "confused")}
    assert named == {str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize("classes", [1, 5, 60, 500])
def test_a_matrix_of_any_size_has_a_picture_on_which_single_errors_are_seen(classes: int) -> None:
    counts = np.diag(np.full(classes, 50))
    counts[0, -1] = 1
    picture = np.asarray(confusion_picture(counts, ["花" if i % 2 else f"name {i}" for i in range(classes)]))
    assert 60 < picture.shape[0] < 2300
    red = (picture[..., 0] > 150) & (picture[..., 1] < 215) & (picture[..., 2] < 215)
    blue = (picture[..., 2] > 100) & (picture[..., 0] < 60)
    assert blue.any() and (red.sum() >= min(4, (1200 // classes) ** 2 // 4) or classes == 1)
