"""Reading sets at URLs in the tests: small loaders, and what must hold of batches and of a cache."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from dist_train.config import DataConfig
from dist_train.data.loader import Batch, TrainLoader
from dist_train.data.manifest import Manifest, read_manifest
from dist_train.place import Place

TARS = [12, 30, 7, 25, 18, 22]  # 114 samples
SHARD = "train-000001.tar"


def config_for(shards: object, cache: Path, **changes: object) -> DataConfig:
    config = DataConfig(
        shards=str(shards), cache=str(cache), image_size=16, crop_margin=4, threads=1, shuffle_window=8, streams=2
    )
    return replace(config, **changes)


def train_loader(
    config: DataConfig, rank: int = 0, world_size: int = 1, manifest: Manifest | None = None
) -> TrainLoader:
    return TrainLoader(
        config,
        manifest or read_manifest(config.shards),
        Place(rank, world_size, world_size),
        batch_size=6,
        micro_batch=6 // world_size,
        seed=3,
    )


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.samples.tolist() == b.samples.tolist() and a.labels.tolist() == b.labels.tolist()
        assert (a.images.numpy() == b.images.numpy()).all()


def assert_whole(cache: Path, shards: int | None = None) -> None:
    """Every shard in the cache is what its name says, and nothing half-done is there."""
    tars = list(cache.glob("*.tar"))
    assert shards is None or len(tars) == shards
    for tar in tars:
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == tar.stem
    assert not [path for path in cache.iterdir() if path.suffix not in (".tar", ".idx", ".lock")]


def gigabytes(size: int) -> float:
    return size / 10**9
