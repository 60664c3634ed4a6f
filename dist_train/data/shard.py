"""An opened shard, and where shards are opened from: a folder, or a URL (`readahead.py`)."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dist_train.data.checksums import read_checksums
from dist_train.data.manifest import ShardInfo
from dist_train.data.plan import Need
from dist_train.data.remote import IsStopped, never_stopped
from dist_train.data.tarindex import TarSample, index_path, index_tar, open_index
from dist_train.errors import WorkError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A tar mapped into memory, and where its samples lie.

    content: the tar as an array; a slice of `tar` itself is a copy, as bytes. The mapping ends with the last view of
    either. from_tar: the samples were listed by reading the tar itself, not its index. checksums: of the samples, if
    it has any.
    """

    path: Path
    tar: mmap.mmap
    content: NDArray[np.uint8]
    samples: Sequence[TarSample]
    from_tar: bool
    checksums: NDArray[np.uint32] | None


class Shards:
    """The shards of one split, by their numbers in the manifest. Where nothing has to be fetched, `open` is enough."""

    def open(self, number: int, stopped: IsStopped = never_stopped, trust_index: bool = True) -> Shard:
        """A shard; without `trust_index` its samples are listed from the tar itself.

        Raises WorkError where it cannot be had, and Stopped (`remote.py`) soon after `stopped()` is true.
        """
        raise NotImplementedError

    def reading_ahead(self, needs: Iterator[Need]) -> AbstractContextManager[None]:
        """While this lasts, shards may be fetched in the order of `needs`, as far as `advance` allows."""
        return nullcontext()

    def advance(self, position: int) -> None:
        """The reader has come to `position` of the needs."""

    def let_go(self, number: int) -> None:
        """The reader has left the shard behind."""

    def check_room(self, needs: Iterator[Need], under_way: int) -> None:
        """Raise UseError if there is no room for what a node's ranks need at once.

        needs: of all ranks of the node together. under_way: how far behind the last position samples are still in use.
        """


class LocalShards(Shards):
    """The shards of a set in a folder."""

    def __init__(self, root: Path, shards: Sequence[ShardInfo]) -> None:
        self.root, self.shards = root, shards

    def open(self, number: int, stopped: IsStopped = never_stopped, trust_index: bool = True) -> Shard:
        """As `Shards.open`."""
        info = self.shards[number]
        path = self.root / info.file
        tar = map_tar(path, lambda: open(path, "rb"))
        samples, from_tar = _list_samples(path, info, trust_index and len(tar) == info.bytes)
        checksums = read_checksums(path, info.samples, info.bytes) if len(samples) == info.samples else None
        return Shard(path, tar, np.frombuffer(tar, np.uint8), samples, from_tar, checksums)


def map_tar(path: Path, open_file: Callable[[], IO[bytes]]) -> mmap.mmap:
    """The bytes of the file that `open_file` opens, mapped. Raises WorkError, naming `path`, where that fails."""
    try:
        with open_file() as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read ({error}); check the set with `python -m shards verify`") from None


def _list_samples(path: Path, info: ShardInfo, trust_index: bool) -> tuple[Sequence[TarSample], bool]:
    """The samples of a shard, and whether the tar itself was read for them because its index cannot be used."""
    listed: Sequence[TarSample] | None = None
    problem = "does not match its tar"
    try:
        index = open_index(path)
        if len(index) == info.samples:
            listed = index
        else:
            problem = f"lists {len(index)} samples, the manifest {info.samples}"
    except WorkError as error:
        problem = str(error).removeprefix(f"{index_path(path)}: ").partition(";")[0]
    if listed is not None and trust_index:
        return listed, False

    try:
        samples = index_tar(path)
        damage = f"{path}: {len(samples)} samples, the manifest says {info.samples}"
    except WorkError as error:
        samples = index_tar(path, damaged=True)
        damage = str(error)
    else:
        if len(samples) == info.samples:
            if listed is None or any(a.members != b.members for a, b in zip(listed, samples, strict=True)):
                log.warning(
                    "%s: %s; the tar itself is used, write the index again with `python -m shards verify --fix-index`",
                    index_path(path),
                    problem,
                )
            return samples, True
    log.warning("%s; what it still holds is used, check the set with `python -m shards verify`", damage)
    # The places of a damaged tar's samples may have shifted; its index still knows them.
    return samples if listed is None or len(samples) == info.samples else listed, True
