"""All odd, rare and broken image files of the shared data: through the builder, and raw into training."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo, read_manifest, write_manifest
from dist_train.data.tarindex import index_tar, write_index
from tests.conftest import REPOSITORY, write_tar

TRAIN_AN_EPOCH = """
import json, resource, sys
from itertools import islice
from pathlib import Path
from dist_train.config import DataConfig
from dist_train.data.loader import Place, TrainLoader
from dist_train.data.manifest import read_manifest

root, batch, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=2, max_bad_samples=limit)
manifest = read_manifest(root)
loader = TrainLoader(config, manifest, Place(), batch_size=batch, micro_batch=batch, seed=0,
                     quarantine=root / "quarantine.jsonl")
weights = []
for got in islice(loader, manifest.split("train").samples // batch):
    weights += zip(got.samples.tolist(), got.weights.tolist(), got.images.isfinite().all(dim=(1, 2, 3)).tolist())
print(json.dumps({"weights": weights, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
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
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    reasons = {record["sample"]: record["reason"] for record in records}
    assert len(records) == len(reasons) and set(reasons) == set(range(samples)) - good
    return good, reasons, result["peak_mb"]
