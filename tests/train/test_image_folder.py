"""Images where a shard set is expected: training builds a set of them once, and doctor says so."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_train.cli import main
from dist_train.config import DataConfig, Recipe
from dist_train.data.manifest import read_manifest
from dist_train.errors import ToldAlready, UseError
from dist_train.image_folder import is_image_source, sets_folder, size_options, with_shard_set
from dist_train.parse import recipe_from_run
from dist_train.place import Place
from dist_train.train import inputs
from tests.harness import arguments, environment, jpeg_bytes, read_summary, wait_for, write_shard_set
from tests.train.forked_ranks import train_on


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos") / "my_images"
    for number in range(60):
        path = root / f"class {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg_bytes(number))
    (root / "labels.csv").write_text("path,class\n" + "".join(f"class {n % 3}/{n}.jpg,c{n % 3}\n" for n in range(60)))
    return root


def test_a_folder_of_folders_or_a_csv_file_is_images_and_a_set_or_tars_are_not(photos: Path, tmp_path: Path) -> None:
    assert is_image_source(str(photos)) and is_image_source(str(photos / "labels.csv"))
    shards = write_shard_set(tmp_path / "set", {"train": [4]})
    assert not is_image_source(str(shards))
    (shards / "manifest.json").unlink()  # an incomplete set, or tars to adopt
    (shards / "more").mkdir()
    assert not is_image_source(str(shards))
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    not_images = (tmp_path / "empty", tmp_path / "none", tmp_path / "none.csv", "https://host/set", "s3://a/b.csv")
    assert not any(is_image_source(str(other)) for other in not_images)


def test_a_folder_without_a_set_is_answered_by_what_lies_in_it(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "photo.jpg").write_bytes(jpeg_bytes(0))
    shards = write_shard_set(tmp_path / "set", {"train": [4]})
    (shards / "manifest.json").unlink()
    for folder in (tmp_path / "loose", photos):
        with pytest.raises(UseError, match=f"a folder of images for each class, `python -m shards build {folder} OUT`"):
            read_manifest(folder)
    with pytest.raises(UseError, match=f"`python -m shards adopt {shards}` makes one of its tars"):
        read_manifest(shards)
    (shards / "build.json").touch()
    with pytest.raises(UseError, match="run the same `python -m shards build` command again to complete it"):
        read_manifest(shards)


def test_the_sets_lie_in_the_cache_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert sets_folder(DataConfig()) == Path("/somewhere/dist-train/sets")
    assert sets_folder(DataConfig(cache="/scratch")) == Path("/scratch/sets")


def test_a_set_is_built_at_the_size_at_which_the_recipe_looks_at_its_images() -> None:
    config = DataConfig(image_size=224, crop_margin=32)
    assert size_options(config) == ["--size", "256"]
    for key, value in (("crop", "random_resized"), ("eval_crop", "center")):
        config = DataConfig(image_size=224, crop_margin=32)
        setattr(config, key, value)
        assert size_options(config) == ["--max-side", "448"], "for crops of any aspect images keep theirs"


def test_two_ranks_train_on_a_folder_of_images_and_the_run_is_used_without_it(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(photos, tmp_path / "images")
    options = {"data.cache": tmp_path / "cache", "train.epochs": 1}
    train_on(2, arguments(images, tmp_path / "run", **options), tmp_path)
    said = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert sum(f"{images}: building a shard set of 60 images in 3 classes" in log for log in said) == 1
    (folder,) = (tmp_path / "cache" / "sets").glob("images-*")
    manifest = read_manifest(folder)
    assert manifest.transform == "resize 20x20" and read_summary(tmp_path / "run")["manifest_digest"] == manifest.digest
    assert recipe_from_run(tmp_path / "run").data.shards == str(folder)
    first = next(line for line in said[0].splitlines() if line.startswith("2 ranks"))
    counts = ", ".join(f"{split.samples} {name}" for name, split in manifest.splits.items())
    assert first.endswith(f"; float32, ZeRO 0; 3 classes, {counts} samples; run folder {tmp_path / 'run'}")

    shutil.rmtree(images)
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_what_the_recipe_gets_wrong_is_told_before_anything_is_built(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data.cache": tmp_path / "cache", "data.streams": 5}
    assert main(["train", *arguments(photos, tmp_path / "run", **options)]) == 2
    assert "data.streams 5 does not divide" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_images_of_which_no_set_can_be_built_are_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "class").mkdir(parents=True)
    # What is called as the builder, where the user stands, is not the builder.
    (tmp_path / "shards.py").write_text("raise SystemExit('not the builder')")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments(tmp_path / "images", tmp_path / "run", **{"data.cache": tmp_path})]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: {tmp_path / 'images'}: no images found")
    with pytest.raises(ToldAlready, match="no shard set could be built"):
        with_shard_set(Recipe(data=DataConfig(shards=str(tmp_path / "images"), cache=str(tmp_path))))


def test_a_builder_ends_with_the_process_that_waits_for_it(tmp_path: Path) -> None:
    """A launcher kills its ranks: what they started must not go on for hours."""
    (tmp_path / "images" / "class").mkdir(parents=True)
    os.mkfifo(tmp_path / "images" / "class" / "photo.jpg")  # nobody writes: its reader waits
    (tmp_path / "images" / "class" / "other.jpg").write_bytes(jpeg_bytes(1))
    words = arguments(tmp_path / "images", tmp_path / "run", **{"data.cache": tmp_path})
    process = subprocess.Popen([sys.executable, "-m", "dist_train.cli", "train", *words], env=environment())
    try:
        wait_for(lambda: list(tmp_path.glob("sets/images-*/build.json")), "the build", 60)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "their end", 30)


def test_doctor_says_that_a_set_will_be_built_and_builds_none(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments(photos, tmp_path / "run", **{"data.cache": tmp_path / "cache"})]) == 0
    assert f"ok   data.shards: {photos} holds images: training first builds a shard set" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


def test_hosts_with_other_sets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(write_shard_set(tmp_path / "set", {"train": [4]}))
    inputs.check_same_set(manifest, "my_images", Place())
    monkeypatch.setattr(inputs, "gather", lambda mine, place: [mine, ("node2", "f" * 64)])
    with pytest.raises(UseError, match=r"data\.shards my_images: node2 has a set of digest ffffffffffff there"):
        inputs.check_same_set(manifest, "my_images", Place(world_size=2))
