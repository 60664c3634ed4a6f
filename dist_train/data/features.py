"""A split's features on disk, computed once, and loaders that give them in the place of its images.

A store is a folder for all splits of one set as one backbone sees them. For each split it holds

    SPLIT.features    the features of every sample, one after the other in the manifest's order, raw
    SPLIT.labels      their classes, int64
    SPLIT.jsonl       a line {chunk, crc32} for each chunk of samples that is written and on the disk

and for all of them store.json, which says what they are of, and quarantine.jsonl, the samples that cannot be used. A
chunk counts if it has a line and its bytes have that checksum: one half-written when a process was killed, or damaged
later, is computed again. Chunks do not depend on ranks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.background import Batch, made_ahead
from dist_train.data.manifest import Manifest
from dist_train.data.plan import EpochPlan, evaluation_batches
from dist_train.data.quarantine import QUARANTINE_NAME, Quarantine, read_entries
from dist_train.data.remote import IsStopped
from dist_train.errors import WorkError
from dist_train.files import write_atomically
from dist_train.place import Place

log = logging.getLogger(__name__)

CHUNK = 256
"""Samples that are written, checked and, where they are damaged, computed again together."""
_LABEL_BYTES = 8


class FeatureStore:
    """The folder, and what one feature is: shape without the batch, and type.

    description: what the features are of; the folder's own must be the same.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, description: dict[str, Any]) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.description = description
        self.row_bytes = int(np.prod(shape)) * dtype.itemsize

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this lasts no other run writes to the folder; waits for one that does, and says so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another run computes these features; waiting for it", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def begin(self, split: str, samples: int) -> None:
        """Make the files of a split, full of holes, unless they are there; one process calls this."""
        document = json.dumps(self.description, indent=1) + "\n"
        if not (self.folder / "store.json").exists():
            write_atomically(self.folder / "store.json", document.encode())
        for path, row_bytes in self._files(split):
            with open(path, "ab") as file:
                file.truncate(samples * row_bytes)

    def missing(self, split: str, samples: int, rank: int, world_size: int) -> list[int]:
        """This rank's part of the chunks that are not there undamaged; every rank looks at as many."""
        known = dict(self._recorded(split))
        chunks = range(-(-samples // CHUNK))
        mine = chunks[rank * len(chunks) // world_size : (rank + 1) * len(chunks) // world_size]
        return [chunk for chunk in mine if chunk not in known or known[chunk] != self._checksum(split, samples, chunk)]

    def write(self, split: str, chunk: int, features: Tensor, labels: Tensor) -> None:
        """Put a whole chunk in its place: features (n, *shape) and labels (n,), in the order of the samples."""
        rows = features.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        classes = labels.to("cpu", torch.int64).numpy().tobytes()
        for (path, row_bytes), content in zip(self._files(split), (rows, classes), strict=True):
            with open(path, "r+b") as file:
                file.seek(chunk * CHUNK * row_bytes)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        line = json.dumps({"chunk": chunk, "crc32": zlib.crc32(classes, zlib.crc32(rows))}) + "\n"
        with open(self._record(split), "ab", buffering=0) as record:
            record.write(line.encode())  # one write, so that other ranks' lines stay whole
            os.fsync(record.fileno())

    def read(self, split: str, samples: int) -> tuple[Tensor, Tensor]:
        """The features (samples, *shape), mapped and not read, and the labels (samples,)."""
        (features, _), (labels, _) = self._files(split)
        try:
            numbers = torch.from_file(str(features), False, samples * int(np.prod(self.shape)), dtype=self.dtype)
            classes = np.fromfile(labels, np.int64)
        except (OSError, RuntimeError) as error:
            raise WorkError(
                f"{features}: cannot be read on this host ({str(error).splitlines()[0]}); "
                "data.feature_cache must be a folder that all hosts share"
            ) from None
        return numbers.view(samples, *self.shape), torch.from_numpy(classes)

    def bad_samples(self, split: str) -> list[tuple[int, str, str]]:
        """(index, name, reason) of the split's samples that cannot be used."""
        entries = read_entries(self.folder / QUARANTINE_NAME)
        return [(entry["sample"], entry["name"], entry["reason"]) for entry in entries if entry["split"] == split]

    def _files(self, split: str) -> tuple[tuple[Path, int], tuple[Path, int]]:
        """The file of the features and that of the labels, each with the bytes of a sample."""
        return (self.folder / f"{split}.features", self.row_bytes), (self.folder / f"{split}.labels", _LABEL_BYTES)

    def _record(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"

    def _recorded(self, split: str) -> Iterator[tuple[int, int]]:
        """(chunk, checksum) of each line that is whole; of a chunk that was written again the last counts."""
        if not self._record(split).exists():
            return
        for line in self._record(split).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                yield int(entry["chunk"]), int(entry["crc32"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short when the process was killed

    def _checksum(self, split: str, samples: int, chunk: int) -> int:
        checksum, rows = 0, min(CHUNK, samples - chunk * CHUNK)
        for path, row_bytes in self._files(split):
            with open(path, "rb") as file:
                file.seek(chunk * CHUNK * row_bytes)
                checksum = zlib.crc32(file.read(rows * row_bytes), checksum)
        return checksum


class _FeatureLoader:
    """What training and evaluation share: samples in, batches of their features out."""

    def __init__(
        self,
        store: FeatureStore,
        config: DataConfig,
        manifest: Manifest,
        split: str,
        place: Place,
        *,
        batch_size: int,
        quarantine: Path | None,
    ) -> None:
        self.config, self.manifest, self.split, self.place = config, manifest, split, place
        self.batch_size = batch_size
        self._features, self._labels = store.read(split, manifest.split(split).samples)
        self.bad = Quarantine(quarantine, split, config.max_bad_samples, place.rank)
        for sample, name, reason in store.bad_samples(split):
            self.bad.add(sample, name, 0, reason)

    def __iter__(self) -> Iterator[Batch]:
        return made_ahead(self._make, self.config.prefetch, self.place.device_id)

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        raise NotImplementedError

    def _batch(self, samples: NDArray[np.int64]) -> Batch:
        chosen = torch.from_numpy(samples)
        weights = torch.from_numpy(~self.bad.among(samples)).float()
        features, labels = self._features[chosen], self._labels[chosen]
        if (gpu := self.place.device_id) is not None:
            device = torch.device("cuda", gpu)
            features, labels, weights = (
                tensor.pin_memory().to(device, non_blocking=True) for tensor in (features, labels, weights)
            )
        return Batch(features, labels, weights, None, None, samples)


class FeatureTrainLoader(_FeatureLoader):
    """As `loader.TrainLoader`, sample for sample, with features (B, *shape), of the store's type, for the images."""

    def __init__(
        self,
        store: FeatureStore,
        config: DataConfig,
        manifest: Manifest,
        place: Place,
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
        samples_consumed: int = 0,
        quarantine: Path | None = None,
    ) -> None:
        super().__init__(store, config, manifest, "train", place, batch_size=micro_batch, quarantine=quarantine)
        counts = manifest.split("train").shard_samples
        self.plan = EpochPlan(counts, batch_size, seed, config.streams, config.shuffle_window)
        self.start = samples_consumed

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        for step in self.plan.batches(self.start, self.place.rank, self.place.world_size):
            for first in range(0, len(step), self.batch_size):
                yield self._batch(step.sample[first : first + self.batch_size])


class FeatureEvalLoader(_FeatureLoader):
    """As `loader.EvalLoader`, with features (B, *shape), of the store's type, for the images."""

    def _make(self, stopped: IsStopped) -> Generator[Batch, None, None]:
        counts = self.manifest.split(self.split).shard_samples
        for positions in evaluation_batches(counts, self.batch_size, self.place.rank, self.place.world_size):
            yield self._batch(positions.sample)
