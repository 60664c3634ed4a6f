"""Writes one shard of a plan, streamed image by image, with index, checksums and statistics; in a worker process."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_train.data.checksums import checksums_path, write_checksums
from dist_train.data.images import BadImage
from dist_train.data.manifest import ShardInfo
from dist_train.data.tarindex import Member, TarSample, index_path, read_index, write_index
from dist_train.errors import WorkError
from dist_train.files import write_atomically
from shards.images import convert
from shards.plan import BuildOptions, ShardPlan
from shards.processes import count_image
from shards.records import LeftOut, Record
from shards.sources.tars import read_member

_BLOCK = 512  # a tar is made of blocks of this many bytes


@dataclass(frozen=True)
class ShardStatistics:
    """The outcome of a planned shard. A shard without any usable image has 0 samples and no tar.

    class_counts: usable images by the plan's class ids. left_out: images of the plan that are not usable. dropped: ids
    of the classes that were taken out again, so that the ids in the tar are those of the classes that remain.
    """

    shard: ShardInfo
    class_counts: dict[int, int]
    left_out: tuple[LeftOut, ...]
    dropped: tuple[int, ...] = ()


class _TarStream:
    """A USTAR archive written front to back: no times, owners or links, so equal content gives equal bytes."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self._digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, content: bytes) -> Member:
        """Append a file; returns where its content lies."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        member = Member(self.bytes, len(content))
        self._write(content)
        self._write(bytes(-len(content) % _BLOCK))
        return member

    def close(self) -> str:
        """Write the end-of-archive blocks and force everything to disk; returns the SHA-256 of the file in hex."""
        self._write(bytes(2 * _BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def write_shard(folder: Path, plan: ShardPlan, text: bool, options: BuildOptions) -> ShardStatistics:
    """Write `folder/NAME.tar`, its index, its checksums and `NAME.stats.json`, each whole or not at all, in this order.

    Raises WorkError if the folder cannot be written to.
    """
    class_counts: Counter[int] = Counter()
    left_out: list[LeftOut] = []

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, (record, class_id) in enumerate(plan.samples):
            try:
                image = convert(_read(record), options.size, options.max_side, options.quality)
            except BadImage as error:
                left_out.append(LeftOut(record.name, error.reason, error.detail))
            else:
                content = {"jpg": image, "cls": str(class_id).encode()}
                if text:
                    line = " ".join((record.tags or "").split())  # as its source made it
                    content["txt"] = line.encode(errors="replace")  # JSON can hold halves of characters
                class_counts[class_id] += 1
                yield f"{plan.name}-{number:06d}", content
            count_image()

    def statistics(shard: ShardInfo) -> ShardStatistics:
        return ShardStatistics(shard, dict(sorted(class_counts.items())), tuple(left_out))

    return _write(folder, plan.name, samples(), statistics)


def drop_classes(
    folder: Path, plan: ShardPlan, text: bool, options: BuildOptions, written: ShardStatistics, dropped: tuple[int, ...]
) -> ShardStatistics:
    """Take the samples of some classes out of a written shard; the ids of the classes behind them move up.

    dropped: ids of the plan. Images are copied, not encoded again. Raises WorkError if the folder cannot be written to.
    """
    if written.dropped:  # by an earlier, interrupted build that found other classes too small
        written = write_shard(folder, plan, text, options)

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        if not written.shard.samples:
            return
        tar = folder / written.shard.file
        with open(tar, "rb") as file:
            for sample in read_index(tar):
                content = {extension: read_member(file, member) for extension, member in sample.members.items()}
                class_id = int(content["cls"])
                if class_id not in dropped:
                    content["cls"] = str(class_id - sum(lower < class_id for lower in dropped)).encode()
                    yield sample.key, content

    return _write(folder, plan.name, samples(), lambda shard: replace(written, shard=shard, dropped=dropped))


def _write(
    folder: Path,
    name: str,
    samples: Iterable[tuple[str, dict[str, bytes]]],
    statistics_of: Callable[[ShardInfo], ShardStatistics],
) -> ShardStatistics:
    """Write a shard and the files beside it, replacing those that are there; returns its statistics.

    samples: key, and content by extension in the order of the checksums: image, class, tags. statistics_of: called
    when all samples are written. Raises WorkError if the folder cannot be written to.
    """
    tar = folder / f"{name}.tar"
    # With the host's name: if a cluster wrongly takes a host for lost, two hosts write the same shard at once.
    temporary = folder / f".{name}.tar.{socket.gethostname()}.{os.getpid()}.tmp"
    index: list[TarSample] = []
    checksums: list[int] = []
    try:
        stream = _TarStream(temporary)
        for key, content in samples:
            index.append(TarSample(key, {ext: stream.add(f"{key}.{ext}", data) for ext, data in content.items()}))
            checksums.append(zlib.crc32(b"".join(content.values())))
        sha256 = stream.close()
        # A shard without statistics counts as not written: an interruption must not leave it with the old ones.
        statistics_path(folder, name).unlink(missing_ok=True)
        if index:
            os.replace(temporary, tar)
            write_index(tar, index)
            write_checksums(tar, checksums)
        else:
            for path in (temporary, tar, index_path(tar), checksums_path(tar)):
                path.unlink(missing_ok=True)
        statistics = statistics_of(ShardInfo(tar.name, len(index), stream.bytes, sha256))
        write_atomically(statistics_path(folder, name), (json.dumps(asdict(statistics)) + "\n").encode())
    except OSError as error:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise WorkError(f"{tar}: cannot be written ({error.strerror})") from None
    return statistics


def statistics_path(folder: Path, name: str) -> Path:
    """Where the statistics of a shard lie until its set is complete."""
    return folder / f"{name}.stats.json"


def read_statistics(folder: Path, name: str) -> ShardStatistics | None:
    """Statistics of a shard that was finished by an earlier, interrupted build; None if it has to be written."""
    try:
        document = json.loads(statistics_path(folder, name).read_bytes())
        statistics = ShardStatistics(
            shard=ShardInfo(**document["shard"]),
            class_counts={int(class_id): count for class_id, count in document["class_counts"].items()},
            left_out=tuple(LeftOut(**entry) for entry in document["left_out"]),
            dropped=tuple(document.get("dropped", ())),
        )
        tar = folder / statistics.shard.file
        beside = index_path(tar).exists() and checksums_path(tar).exists()
        if statistics.shard.samples and (tar.stat().st_size != statistics.shard.bytes or not beside):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return statistics


def _read(record: Record) -> bytes:
    try:
        return record.read()
    except FileNotFoundError as error:
        raise BadImage("missing file", str(error.strerror)) from None
    except OSError as error:
        raise BadImage("unreadable file", error.strerror or str(error)) from None
