"""An epoch over a set with damage in it, beside that of a sound one."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.config import DataConfig
from dist_train.data.loader import TrainLoader
from dist_train.data.manifest import ClassInfo, Manifest, SplitInfo, read_manifest, write_manifest
from dist_train.place import Place
from tests.harness import CLASSES, describe_shard

COUNTS = [12, 9, 15]
TOTAL = sum(COUNTS)


@dataclass(frozen=True)
class Epoch:
    """The samples of the first epoch with weight 1 as {sample: (label, pixels)}, and the records of the others."""

    good: dict[int, tuple[int, NDArray[np.float32]]]
    records: list[dict[str, object]]


def run_epoch(root: Path, world_size: int = 1, epochs: int = 1, **changes: object) -> Epoch:
    """Train through some epochs; every sample of the manifest must come exactly once in each."""
    config = DataConfig(shards=str(root), image_size=16, crop_margin=4, threads=1, shuffle_window=8, **changes)
    manifest = read_manifest(root)
    total = manifest.split("train").samples
    file = root.parent / f"{root.name}.quarantine.jsonl"
    seen: Counter[int] = Counter()
    good = {}
    ranks = [
        iter(
            TrainLoader(
                config,
                manifest,
                Place(rank, world_size),
                batch_size=12,
                micro_batch=6,
                seed=3,
                quarantine=file,
            )
        )
        for rank in range(world_size)
    ]
    steps = total // 6 // world_size
    for i in range(epochs * steps):
        for rank in ranks:  # they take turns, as processes do
            batch = next(rank)
            rows = zip(batch.samples.tolist(), batch.labels.tolist(), batch.weights, batch.images, strict=True)
            for sample, label, weight, image in rows:
                seen[sample] += 1
                if weight == 1 and i < steps:
                    good[sample] = label, image.numpy().copy()
    assert seen == dict.fromkeys(range(total), epochs)
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    assert len(records) == len({record["sample"] for record in records})
    assert set(good) == set(range(total)) - {record["sample"] for record in records}
    return Epoch(good, records)


def assert_only_bad(epoch: Epoch, bad: set[int], sound: Epoch) -> None:
    """`bad` are recorded, and every other sample has its own picture and class."""
    assert {record["sample"] for record in epoch.records} == bad
    for sample, (label, pixels) in epoch.good.items():
        assert label == sample % CLASSES
        assert (pixels == sound.good[sample][1]).all()


def write_named_set(
    root: Path,
    files: list[tuple[str, dict[str, bytes]]],
    tar_format: int = tarfile.PAX_FORMAT,
) -> Path:
    """A set of one shard from (key, {extension: content}); the key is used as it is."""
    root.mkdir()
    path = root / "train-000000.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, members in files:
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    shard = describe_shard(path, len(files))
    infos = tuple(ClassInfo(f"class {i}", 0) for i in range(CLASSES))
    write_manifest(root, Manifest(infos, {"train": SplitInfo(len(files), (shard,))}, tool="tests"))
    return root
