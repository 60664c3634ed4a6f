"""`predict`: the same answer in any batch and as in evaluation, in order, each bad image by itself, tables, tags."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.cli import main
from dist_train.config import DataConfig
from dist_train.data import reader as reader_module
from dist_train.data.folder import images_below, tags_beside
from dist_train.data.images import BadImage
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.reader import ImageReader
from dist_train.errors import UseError
from dist_train.parse import recipe_from_run
from dist_train.use.pictures import Picture, pictures
from dist_train.use.predict import Prediction, predict, write_csv
from dist_train.use.trained import TrainedModel, load_trained
from tests.harness import CLASSES, jpeg_bytes, smooth_image, train, write_shard_set

COUNT = 11


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def damaged_png() -> bytes:
    """Only decoding shows that its pixels are damaged: DALI gives up the whole batch."""
    png, pixels = encoded(Image.new("RGB", (20, 20)), "PNG"), b"IDAT" + bytes(20)
    return png[:33] + struct.pack(">I", 20) + pixels + struct.pack(">I", zlib.crc32(pixels)) + png[-12:]


def odd_images() -> dict[int, bytes]:
    """Images that are converted for DALI, by their place among the others."""
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        2: encoded(smooth_image(2, 30, 22).convert("CMYK"), "JPEG"),
        5: encoded(smooth_image(5, 30, 22), "JPEG", exif=turned),
        6: encoded(smooth_image(6, 30, 22).convert("LA"), "PNG"),
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": [24], "test": [COUNT]}
    odd = {24 + place: image for place, image in odd_images().items()}
    return write_shard_set(tmp_path_factory.mktemp("sets") / "set", splits, text=True, replace=odd)


def load(run: Path) -> TrainedModel:
    return load_trained(run, recipe_from_run(run), "last")


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step at a high rate, so that images have different answers."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(shards, run, train__stop_after_steps=1, optim__lr=0.05) == 0
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> TrainedModel:
    return load(run)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The images of the test split, as files."""
    folder = tmp_path_factory.mktemp("files")
    for place in range(COUNT):
        content = odd_images().get(place) or jpeg_bytes(24 + place)
        (folder / f"{place:02d}.jpg").write_bytes(content)
    return sorted(folder.iterdir())


def answers(model: TrainedModel, asked: list[Any], **options: Any) -> list[Prediction]:
    return list(predict(model, pictures(asked), top=None, **options))


def table(predictions: list[Prediction]) -> torch.Tensor:
    """(images, classes), in the order of the classes."""
    rows = [dict(zip(one.names, one.probabilities, strict=True)) for one in predictions]
    return torch.tensor([[row[f"class {i}"] for i in range(CLASSES)] for row in rows])


def test_files_have_the_answers_that_evaluation_has_for_the_same_samples(
    shards: Path, model: TrainedModel, files: list[Path]
) -> None:
    loader = EvalLoader(model.recipe.data, read_manifest(str(shards)), "test", model.place, batch_size=COUNT)
    (batch,) = loader
    with torch.no_grad():
        expected = model.forward(batch).double().softmax(dim=1)
    got = table(answers(model, files, batch_size=4))
    assert (got.double() - expected).abs().max() < 1e-5
    assert expected.std(dim=0).max() > 1e-3  # or it would say nothing


@pytest.mark.parametrize("batch_size", [1, 3, COUNT, 64])
def test_an_image_has_the_same_answer_in_whatever_batch_it_is_and_bad_ones_cost_themselves(
    model: TrainedModel, files: list[Path], tmp_path: Path, batch_size: int
) -> None:
    bad = {"damaged.png": damaged_png(), "none.jpg": b"no image", "empty.jpg": b""}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    asked = [*files[:1], tmp_path / "damaged.png", *files[1:4], tmp_path / "missing.jpg", *files[4:]]
    asked += [tmp_path / "none.jpg", tmp_path / "empty.jpg"]
    got = answers(model, asked, batch_size=batch_size)
    assert [one.path for one in got] == asked
    assert [one.path for one in got if one.error is not None] == [path for path in asked if path.parent == tmp_path]
    for one in got:
        assert (one.error is None) == (len(one.names) == CLASSES) and str(one.path) in (one.error or str(one.path))
    whole = table(answers(model, files))
    assert (table([one for one in got if one.error is None]) - whole).abs().max() < 1e-5


def test_what_dali_refuses_is_converted_and_changes_nothing_for_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(image_size=24)
    files = [jpeg_bytes(0), encoded(smooth_image(1, 40, 30), "GIF"), jpeg_bytes(2), damaged_png()]
    expected = [ImageReader(config, None).read(data) for data in files[:3]]
    monkeypatch.setattr(reader_module, "plain_size", lambda data, most: (1, 1))  # DALI gets all of them as they are
    reader = ImageReader(config, None, batch_size=6)
    for _ in range(2):  # pipelines that failed are made anew
        images, problems = reader.read_batch([lambda data=data: data for data in files])  # type: ignore[misc]
        assert images.shape == (6, 3, 24, 24) and set(problems) == {3} and isinstance(problems[3], BadImage)
        for got, wanted in zip(images, expected, strict=False):
            assert torch.equal(got, wanted[0])
        assert torch.equal(images[3], images[5])  # grey, as where there is no file
    reader.close()


def test_memory_is_bounded_files_are_read_as_their_answers_are_taken(
    model: TrainedModel, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path | None] = []

    def reading(picture: Picture) -> bytes:
        read.append(picture.path)
        return original(picture)

    original = Picture.read
    monkeypatch.setattr(Picture, "read", reading)
    asked = pictures(files * 5)
    most = (model.recipe.data.prefetch + 2) * 4  # made, being made, and in the caller's hands
    for done, _ in enumerate(predict(model, asked, batch_size=4)):
        assert len(read) - done <= most
    assert len(read) == len(asked)


# ---------------------------------------------------------------------- what can be asked
def test_bytes_arrays_and_images_of_pillow_have_the_answer_of_their_file(
    model: TrainedModel, files: list[Path]
) -> None:
    png = encoded(smooth_image(7, 33, 44), "PNG")
    image = Image.open(io.BytesIO(png))
    got = answers(model, [png, image, np.asarray(image), files[5], Image.open(files[5])])
    rows = table(got)
    assert (rows[0] - rows[1:3]).abs().max() < 1e-5 and (rows[3] - rows[4]).abs().max() < 1e-5
    assert (rows[0] - rows[3]).abs().max() > 1e-3
    assert [one.path for one in got] == [None, None, None, files[5], None]
    assert answers(model, [np.zeros((4, 4, 2), np.uint8)])[0].error is not None
    closed = Image.open(files[5])
    closed.close()
    bad, good = answers(model, [closed, image])
    assert "cannot decode" in (bad.error or "") and good.error is None
    with pytest.raises(UseError, match="not an image: int"):
        pictures([3])  # type: ignore[list-item]


def test_of_a_folder_all_images_are_taken_and_a_broken_one_is_told(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/10.jpg", "a.png", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg_bytes(0))
    (tmp_path / "without ending").write_bytes(jpeg_bytes(0))
    (tmp_path / "broken.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("tags")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    for name, other in (("c", "d"), ("d", "c")):  # each leads to the other
        (tmp_path / name).mkdir()
        (tmp_path / name / "across").symlink_to(tmp_path / other)
    (tmp_path / "c" / "1.jpg").write_bytes(jpeg_bytes(0))
    names = ["a.png", "broken.jpg", "without ending", "b/10.jpg", "b/2.JPG", "c/1.jpg", "d/across/1.jpg"]
    assert [str(path.relative_to(tmp_path)) for path in images_below(tmp_path)] == names
    (tmp_path / "empty").mkdir()
    with pytest.raises(UseError, match="no images in this folder"):
        pictures(tmp_path / "empty")


# ---------------------------------------------------------------------- the command
def test_a_table_has_a_row_for_each_image_in_order_and_failures_are_one_line_each(
    run: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad,\n.jpg").write_bytes(b"x")
    file = tmp_path / "out.csv"
    words = ["predict", str(run), str(tmp_path), str(files[0].parent), "--csv", str(file), "--batch-size", "4"]
    assert main([*words, "--top", "2"]) == 1
    out, said = capsys.readouterr()
    assert out == "" and said.count("not an image that can be used") == 1 and "12 images, 1 of them failed" in said
    rows = list(csv.DictReader(file.open(encoding="utf-8", newline="")))
    assert [row["path"] for row in rows] == [str(tmp_path / "bad,\n.jpg"), *map(str, files)]
    assert list(rows[0]) == ["path", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert rows[0]["class_1"] == "" and "not an image" in rows[0]["error"]
    printed = next(iter(answers(load(run), files[:1])))
    assert rows[1]["class_1"] == printed.names[0] and rows[1]["error"] == ""
    assert float(rows[1]["probability_1"]) == pytest.approx(printed.probabilities[0], abs=1e-5)
    assert main(["predict", str(run), str(files[0]), "--csv", str(tmp_path)]) == 1
    assert "Is a directory" in capsys.readouterr().err


def test_a_table_that_is_interrupted_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield Prediction(tmp_path / "a.jpg", ["x"], [1.0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(interrupted(), tmp_path / "out.csv", 1)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- tags
def test_tags_lie_beside_their_images(
    shards: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reads = {"model__text_tokens": 4, "data__tokenizer": "tags", "train__stop_after_steps": 1, "optim__lr": 0.05}
    assert train(shards, tmp_path / "run", **reads) == 0
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("cats", "hair", "none", "unknown"):
        (folder / f"{name}.jpg").write_bytes(jpeg_bytes(3))
    (folder / "cats.txt").write_text("cat, ears\n")
    (folder / "hair.tags").write_bytes(b"\xef\xbb\xbfred hair")
    (folder / "unknown.txt").write_text("blue")
    assert tags_beside(folder / "cats.jpg") == "cat ears" and tags_beside(folder / "none.jpg") is None
    model = load(tmp_path / "run")
    capsys.readouterr()
    got = table(answers(model, [folder], tags_from_sidecars=True, batch_size=3))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "1 of 4 images have no tags" in said[0] and "none.jpg" in said[0]
    assert "1 of 4 images have tags beside them of which the model knows none" in said[1] and "unknown" in said[1]
    for place, tags in enumerate(("cat ears", "red hair", "", "blue")):
        (alone,) = table(answers(model, [folder / "cats.jpg"], tags=tags))
        assert (got[place] - alone).abs().max() < 1e-5
    assert (got[0] - got[1]).abs().max() > 1e-4
    with pytest.raises(UseError, match="give one of them"):
        answers(model, [folder], tags="x", tags_from_sidecars=True)
    assert main(["predict", str(run), str(folder), "--tags-from-sidecars"]) == 2
    assert "--tags-from-sidecars: the model of" in capsys.readouterr().err


def test_a_gpu_that_is_asked_for_and_missing_is_told(
    model: TrainedModel, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in the thread that reads is raised where the answers are taken."""
    recipe = replace(model.recipe, data=replace(model.recipe.data, device="gpu"))
    on_cpu = replace(model, recipe=recipe, place=replace(model.place, device_id=None))
    with pytest.raises(UseError, match=r"data\.device is gpu"):
        answers(on_cpu, files)
