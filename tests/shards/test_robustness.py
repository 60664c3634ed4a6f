"""All odd, rare and broken image files of the shared data: beside what Pillow says, and raw into training."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from dist_train.data.images import BadImage, decode
from dist_train.data.manifest import read_manifest
from tests.harness import REPOSITORY, jpeg_bytes, write_raw_set

TRAIN_AN_EPOCH = """
import json, sys
from itertools import islice
from pathlib import Path
from dist_train.config import DataConfig
from dist_train.data.loader import TrainLoader
from dist_train.place import Place
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


def test_what_pillow_loads_is_taken_and_what_it_does_not_load_is_refused_but_for_these(
    shared_data: Path, expected: dict[str, dict[str, str]]
) -> None:
    refused: Counter[str] = Counter()
    differs = {}
    for path, row in expected.items():
        try:
            decode((shared_data / "robustness" / path).read_bytes())
            said = "ok"
        except BadImage as error:
            said = error.detail
            refused[error.reason] += 1
        if (said == "ok") != (row["load"] == "ok"):
            differs[path] = said if said != "ok" else row["load"]
    assert differs == {
        # Pillow does not look at the checksums of pixels.
        "image-png-bugfixes/x_interlaced_chck.png": "the checksum of its IDAT chunk is wrong",
        "pngsuite/xcsn0g01.png": "the checksum of its IDAT chunk is wrong",
        # Whole pixels, and metadata that Pillow fails on: profiles, text, animation, colour spaces, the end.
        "image-png-bugfixes/cicp_pq.png": "UnidentifiedImageError",
        "image-png-bugfixes/issue#430.png": "UnidentifiedImageError",
        "image-png-bugfixes/x_consecutive_idat.png": "OSError",
        "pillow/apng/chunk_no_fctl.png": "SyntaxError",
        "pillow/png_decompression_dos.png": "ValueError",
        "pillow/truncated_end_chunk.png": "OSError",
        "pillow/unknown_compression_method.png": "UnidentifiedImageError",
    }
    assert set(refused) == {"not an image", "truncated", "cannot decode", "decompression bomb", "empty file"}
    assert refused["decompression bomb"] == 3  # one of them is no whole JPEG either


def test_all_files_raw_train_through_an_epoch_and_the_bad_ones_are_recorded_with_reasons(
    shared_data: Path, expected: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    images = [(shared_data / "robustness" / path).read_bytes() for path in expected]
    good, reasons, peak_mb = train_an_epoch(write_raw_set(tmp_path / "set", images), batch=61)
    assert peak_mb < 2000  # the largest real picture has 10 megapixels; one of the bombs is 12 GB
    assert len(good) == 526 - 2 + 7
    assert Counter(reason.partition(":")[0] for reason in reasons.values()) == {
        "not an image": 75,
        "cannot decode": 43,
        "truncated": 18,
        "decompression bomb": 3,
        "empty file": 1,
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
