"""All odd, rare and broken image files of the shared data: through the builder, and raw into training."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo, read_manifest, write_manifest
from dist_train.data.tarindex import index_tar, write_index
from shards.__main__ import main
from tests.conftest import REPOSITORY, jpeg_bytes, write_tar

TRAIN_AN_EPOCH = """
import json, sys
from itertools import islice
from pathlib import Path
from dist_train.config import DataConfig
from dist_train.data.loader import Place, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.train.meters import peak_resident_mb

root, batch, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=2, max_bad_samples=limit)
manifest = read_manifest(root)
loader = TrainLoader(config, manifest, Place(), batch_size=batch, micro_batch=batch, seed=0,
                     quarantine=root / "quarantine.jsonl")
weights = []
for got in islice(loader, manifest.split("train").samples // batch):
    weights += zip(got.samples.tolist(), got.weights.tolist(), got.images.isfinite().all(dim=(1, 2, 3)).tolist())
print(json.dumps({"weights": weights, "peak_mb": peak_resident_mb()}))
"""


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> dict[str, dict[str, str]]:
    """What Pillow makes of each file, by path."""
    with open(shared_data / "robustness" / "expected_pillow.csv", newline="", encoding="utf-8") as lines:
        return {row["path"]: row for row in csv.DictReader(lines)}


def write_raw_set(root: Path, images: list[bytes]) -> Path:
    """A set of one shard that holds the files as they are, past the builder."""
    root.mkdir()
    tar = root / "train-000000.tar"
    write_tar(tar, [{"jpg": image, "cls": b"0"} for image in images])
    write_index(tar, index_tar(tar))
    content = tar.read_bytes()
    shard = ShardInfo(tar.name, len(images), len(content), hashlib.sha256(content).hexdigest())
    classes = (ClassInfo("all", len(images)),)
    write_manifest(root, Manifest(classes, {"train": SplitInfo(len(images), (shard,))}, tool="tests"))
    return root


def train_an_epoch(root: Path, batch: int) -> tuple[set[int], dict[int, str], float]:
    """Train through the set in a process of its own: (good samples, reasons of the bad ones, peak memory in MB)."""
    samples = read_manifest(root).split("train").samples
    command = [sys.executable, "-c", TRAIN_AN_EPOCH, str(root), str(batch), str(samples)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert sorted(sample for sample, _, _ in result["weights"]) == list(range(samples))
    assert all(finite for _, _, finite in result["weights"])
    good = {sample for sample, weight, _ in result["weights"] if weight == 1}
    file = root / "quarantine.jsonl"
    records = read_lines(file) if file.exists() else []
    reasons = {record["sample"]: record["reason"] for record in records}
    assert len(records) == len(reasons) and set(reasons) == set(range(samples)) - good
    return good, reasons, result["peak_mb"]


def test_the_builder_takes_exactly_what_pillow_loads_and_training_takes_all_of_that(
    shared_data: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    source, root = tmp_path / "source.csv", tmp_path / "set"
    source.write_text("path,class,split\n" + "".join(f"{path},all,train\n" for path in expected))
    options = ["--root", str(shared_data / "robustness"), "--workers", "2", "--max-side", "64"]
    assert main(["build", str(source), str(root), *options]) == 0
    left_out = {entry["name"]: entry["reason"] for entry in read_lines(root / "left_out.jsonl")}
    assert set(left_out) == {path for path, row in expected.items() if row["load"] != "ok"}
    # Pillow's exception and the builder's reason for it.
    assert Counter((expected[path]["load"], reason) for path, reason in left_out.items()) == {
        ("UnidentifiedImageError", "not an image"): 79,
        ("UnidentifiedImageError", "empty file"): 1,
        ("OSError", "cannot decode"): 39,
        ("OSError", "truncated"): 22,
        ("DecompressionBombError", "decompression bomb"): 2,
        ("SyntaxError", "cannot decode"): 1,  # an animated PNG with its chunks out of order
        ("ValueError", "cannot decode"): 1,  # a compressed text chunk that unpacks to more than 1 MiB
    }
    good, _, _ = train_an_epoch(root, batch=263)
    assert len(good) == 526


def test_all_files_raw_train_through_an_epoch_and_the_bad_ones_are_recorded_with_reasons(
    shared_data: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    images = [(shared_data / "robustness" / path).read_bytes() for path in expected]
    _, reasons, peak_mb = train_an_epoch(write_raw_set(tmp_path / "set", images), batch=61)
    assert peak_mb < 2000  # the largest real picture has 10 megapixels; one of the bombs is 12 GB
    found: Counter[tuple[str, str]] = Counter()
    for sample, row in enumerate(expected.values()):
        reason = reasons.get(sample, "trained").partition(" (")[0]
        announced = re.sub(r"^announces \d+ x \d+ pixels.*", "announces too many pixels, or none", reason)
        found[("loads" if row["load"] == "ok" else "fails", announced)] += 1
    # What training takes and Pillow does not: JPEGs cut short after much of the picture (DALI's decoder fills the rest
    # with grey), and PNGs whose damage lies in chunks that do not matter to the picture. Where only a region of a
    # picture is decoded, damage outside of it may go unseen.
    assert found.pop(("fails", "trained")) == 16
    assert found.pop(("fails", "cannot be decoded")) == 29
    assert found == {
        ("loads", "trained"): 430,
        ("fails", "not an image, or its header is damaged"): 94,
        ("fails", "announces too many pixels, or none"): 2,
        ("fails", "its image is empty"): 1,
        ("fails", "a jpeg2k image; samples are JPEG, PNG or WebP"): 2,
        ("fails", "a tiff image; samples are JPEG, PNG or WebP"): 1,
        # What Pillow loads and training leaves out. Of formats that shards do not hold (the builder converts them):
        ("loads", "a bmp image; samples are JPEG, PNG or WebP"): 3,
        ("loads", "a pnm image; samples are JPEG, PNG or WebP"): 6,
        ("loads", "a tiff image; samples are JPEG, PNG or WebP"): 35,
        ("loads", "a jpeg2k image; samples are JPEG, PNG or WebP"): 4,
        # 35 GIFs, and 9 JPEGs with stray bytes or impossible markers in their headers, which Pillow passes over
        ("loads", "not an image, or its header is damaged"): 44,
        # PNGs: two with a wrong checksum, two with impossible animation chunks
        ("loads", "cannot be decoded"): 4,
    }


def test_images_that_announce_too_many_pixels_take_no_memory(tmp_path: Path) -> None:
    good = [jpeg_bytes(n) for n in range(8)]
    jpeg, webp = bytearray(jpeg_bytes(9)), bytearray(webp_bytes())
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 30000, 30000)
    webp[24:30] = (16000).to_bytes(3, "little") * 2
    bombs = [png_bomb(20000), bytes(jpeg), bytes(webp), png_bomb(20000)]
    _, none, quiet = train_an_epoch(write_raw_set(tmp_path / "good", good + good[:4]), batch=6)
    _, reasons, peak = train_an_epoch(write_raw_set(tmp_path / "bombs", good + bombs), batch=6)
    assert not none
    assert set(reasons) == {8, 9, 10, 11}
    assert all("announces" in reason and "data.max_pixels is 89478485" in reason for reason in reasons.values())
    assert peak < quiet + 100


def png_bomb(side: int) -> bytes:
    """A valid black-and-white PNG of side x side pixels, a few tens of kilobytes long."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(side * (1 + side // 8)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_bytes() -> bytes:
    """An animated WebP: its canvas is announced in the header of the extended format."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def read_lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
