"""Damage inside a sample of a local set is found when the sample is first read, whatever a decoder would make of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_train.config import DataConfig
from dist_train.data.checksums import checksums_path, compute_checksums, read_checksums
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.tarindex import index_tar, read_index
from dist_train.place import Place
from shards.__main__ import main
from tests.harness import edit, jpeg_bytes, smooth_image, write_tar

SAMPLES = 24


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A set of one shard with 24 photos of 200 x 160 pixels and tags, made by the builder."""
    for n in range(SAMPLES):
        folder = tmp_path / "source" / f"class {n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth_image(n, 200, 160).save(folder / f"{n}.jpg", quality=98)
        (folder / f"{n}.txt").write_text(f"tag_{n} smile")
    arguments = ["build", str(tmp_path / "source"), str(tmp_path / "set"), "--ratios", "1,0,0", "--workers", "1"]
    assert main(arguments) == 0
    return tmp_path / "set"


def spoil(tar: Path, place: int, extension: str, change: Callable[[bytes], bytes]) -> None:
    """Change the content of a member without a change of its length."""
    member = read_index(tar)[place].members[extension]
    place_in_tar = slice(member.offset, member.offset + member.size)
    new = change(tar.read_bytes()[place_in_tar])
    assert len(new) == member.size
    edit(tar, lambda content: content.__setitem__(place_in_tar, new))


def zero_the_middle(image: bytes) -> bytes:
    middle = len(image) // 2
    return image[: middle - 1500] + bytes(3000) + image[middle + 1500 :]


def train_two_epochs(root: Path, micro_batch: int = 8) -> dict[str, str]:
    """Names and reasons of the samples that were left out."""
    config = DataConfig(shards=str(root), image_size=32, crop_margin=8, threads=1)
    loader = TrainLoader(
        config,
        read_manifest(root),
        Place(),
        batch_size=8,
        micro_batch=micro_batch,
        seed=0,
        quarantine=root / "quarantine.jsonl",
    )
    batches = iter(loader)
    weights: dict[int, float] = {}
    for _ in range(2 * SAMPLES // 8):
        batch = next(batches)
        weights |= zip(batch.samples.tolist(), batch.weights.tolist(), strict=True)
    file = root / "quarantine.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert {sample for sample, weight in weights.items() if not weight} == {record["sample"] for record in records}
    assert len(weights) == SAMPLES
    file.unlink(missing_ok=True)
    return {record["name"]: record["reason"] for record in records}


@pytest.fixture
def tar(built: Path) -> Path:
    (tar,) = built.glob("*.tar")
    assert train_two_epochs(built) == {}
    return tar


def test_bytes_zeroed_inside_a_jpeg_leave_the_sample_out(
    built: Path, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = read_index(tar)[5].key
    spoil(tar, 5, "jpg", zero_the_middle)
    (item,) = train_two_epochs(built).items()
    assert item == (f"{tar.name}:{key}", f"damaged: it is not what {tar.stem}.crc says")
    config = DataConfig(shards=str(built), image_size=32, threads=1)
    batches = list(EvalLoader(config, read_manifest(built), "train", Place(), batch_size=9))
    assert np.concatenate([batch.weights for batch in batches]).tolist() == [float(n != 5) for n in range(SAMPLES)]
    assert main(["verify", str(built), "--workers", "1"]) == 1
    assert f"{tar}: sample {key}: is not what {tar.stem}.crc says" in capsys.readouterr().out.splitlines()


def test_a_class_or_a_tag_that_changed_leaves_the_sample_out(built: Path, tar: Path) -> None:
    spoil(tar, 3, "cls", lambda digits: b"1" if digits != b"1" else b"2")
    spoil(tar, 7, "txt", lambda tags: tags.replace(b"smile", b"frown"))
    assert len(train_two_epochs(built)) == 2


def test_one_turned_bit_in_the_pixels_is_found(built: Path, tar: Path) -> None:
    spoil(tar, 9, "jpg", lambda image: image[:-300] + bytes([image[-300] ^ 16]) + image[-299:])
    assert len(train_two_epochs(built)) == 1


def test_a_set_without_checksums_trains_and_verify_writes_them(
    built: Path, tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = checksums_path(tar).read_bytes()
    checksums_path(tar).unlink()
    assert train_two_epochs(built) == {}
    assert main(["verify", str(built), "--workers", "1"]) == 0
    assert main(["verify", str(built), "--fix-index", "--workers", "1"]) == 0
    assert f"{checksums_path(tar)}: written again" in capsys.readouterr().out
    assert checksums_path(tar).read_bytes() == original


def test_checksums_are_not_written_of_a_tar_that_is_damaged(built: Path, tar: Path) -> None:
    checksums_path(tar).unlink()
    spoil(tar, 5, "jpg", zero_the_middle)
    assert main(["verify", str(built), "--fix-index", "--workers", "1"]) == 1
    assert not checksums_path(tar).exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20],
        lambda content: content.replace(b"crc32 v1", b"crc32 v2"),
        lambda content: content[:-3] + b"?\n",
        lambda content: b"",
        lambda content: content.replace(b" 24 ", b" 24 1"),  # as of a tar of another size
    ],
)
def test_damaged_checksums_are_named_and_condemn_no_sample(
    built: Path,
    tar: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = checksums_path(tar)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert train_two_epochs(built) == {}
    assert any(str(path) in record.getMessage() for record in caplog.records)
    assert main(["verify", str(built), "--workers", "1"]) == 1
    assert f"{path}: damaged, or of another tar; write it again with --fix-index" in capsys.readouterr().out
    assert main(["verify", str(built), "--fix-index", "--workers", "1"]) == 0


def test_adopt_writes_them_for_tars_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    tar = folder / "train-7.tar"
    write_tar(tar, [{"cls": b"0", "json": b"{}", "jpg": jpeg_bytes(n, 160, 160)} for n in range(SAMPLES)])
    assert main(["adopt", str(folder), "--workers", "1"]) == 0
    assert read_checksums(tar, SAMPLES, tar.stat().st_size).tolist() == compute_checksums(tar, index_tar(tar))
    spoil(tar, 2, "jpg", lambda image: image[:-90] + bytes(60) + image[-30:])
    assert list(train_two_epochs(folder)) == ["train-7.tar:000002"]
