"""Samples that cannot be used: which they are, their record in the run folder, and how many a run bears.

`quarantine.jsonl` has a line for each: split, sample (index in the manifest's order), name (SHARD:KEY), the epoch and
rank that met it, reason. All ranks append to it and count by it, and a resumed run begins with what it says.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.errors import WorkError

log = logging.getLogger(__name__)

QUARANTINE_NAME = "quarantine.jsonl"


class Quarantine:
    """The bad samples of one split. file: the record, or None to keep none. limit: bad samples of a run, all splits."""

    def __init__(self, file: Path | None, split: str, limit: int, rank: int) -> None:
        self.file, self.split, self.limit, self.rank = file, split, limit, rank
        self._bad: set[tuple[str, int]] = set(_read(file))
        if len(self._bad) > limit:  # the run that ended with this error is continued
            raise WorkError(
                f"{file}: lists more samples than data.max_bad_samples ({limit}); check the set with `python -m shards "
                "verify`, or raise the limit to go on without them"
            )

    def __contains__(self, sample: int) -> bool:
        return (self.split, sample) in self._bad

    def among(self, samples: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the samples, (B,), are left out; (B,)."""
        if not self._bad:
            return np.zeros(len(samples), bool)
        return np.isin(samples, [sample for split, sample in self._bad if split == self.split])

    def add(self, sample: int, name: str, epoch: int, reason: str) -> None:
        """Leave a sample out from now on; record it unless it is known. Raises WorkError where they are too many."""
        if sample in self:
            return
        log.warning("left out %s: %s", name, reason)
        self._bad.add((self.split, sample))
        if self.file is not None:
            entry = {
                "split": self.split,
                "sample": sample,
                "name": name,
                "epoch": epoch,
                "rank": self.rank,
                "reason": reason,
            }
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._bad.update(_record(self.file, entry))
        if len(self._bad) > self.limit:
            raise WorkError(
                f"more than data.max_bad_samples ({self.limit}) samples are damaged or cannot be decoded, the last "
                f"{name}: {reason}; check the set with `python -m shards verify`"
            )


def read_entries(file: Path | None) -> Iterator[dict[str, Any]]:
    """Each line of a record that is whole."""
    if file is None or not file.exists():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            yield entry | {"split": entry["split"], "sample": int(entry["sample"])}
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the process was killed


def _read(file: Path | None) -> Iterator[tuple[str, int]]:
    """(split, sample) of each."""
    return ((entry["split"], entry["sample"]) for entry in read_entries(file))


def _record(file: Path, entry: dict[str, object]) -> set[tuple[str, int]]:
    """Append a line for the sample unless it has one; what other ranks recorded, perhaps this sample in another epoch.

    Under a lock, as ranks may meet a sample at the same time; one write, so that a killed process leaves whole lines.
    """
    with open(file, "ab", buffering=0) as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        recorded = set(_read(file))
        if (entry["split"], entry["sample"]) not in recorded:
            begin = "" if file.read_bytes()[-1:] in (b"", b"\n") else "\n"  # the last line was cut short
            record.write((begin + json.dumps(entry) + "\n").encode())
    return recorded
