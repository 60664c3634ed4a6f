"""Sample bytes out of the shards: each tar is memory-mapped when first used, nothing is copied.

The tars lie in a folder, or at a URL and then in the local cache; the reader of the plan keeps open only those that
its current windows touch.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_train.data.manifest import SplitInfo
from dist_train.data.plan import Need, Positions
from dist_train.data.readahead import RemoteShards
from dist_train.data.tarindex import Member, TarSample, index_path, read_index
from dist_train.errors import WorkError


@dataclass(frozen=True)
class OpenShard:
    """A mapped tar and where its samples lie."""

    path: Path
    content: NDArray[np.uint8]
    samples: list[TarSample]


@dataclass(frozen=True)
class FetchedBatch:
    """Samples as they lie in the shards: encoded images (views into the mapping), class ids, tags."""

    images: list[NDArray[np.uint8]]
    labels: NDArray[np.int64]
    texts: list[str]


class ShardFetcher:
    """Reads samples of one split of the shard set in the folder `root`, or of `remote` if given."""

    def __init__(
        self, root: str | Path, split: SplitInfo, num_classes: int, remote: RemoteShards | None = None
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.num_classes = num_classes
        self.remote = remote
        self._open: dict[int, OpenShard] = {}
        self._needs: Iterator[Need] = iter(())
        self._next_need: Need | None = None

    @contextmanager
    def following(self, needs: Callable[[], Iterator[Need]]) -> Iterator[None]:
        """While this lasts, shards are let go when `needs` no longer names them; remote ones are read ahead."""
        self._needs = needs()
        self._next_need = next(self._needs, None)
        with self.remote.reading_ahead(needs()) if self.remote else nullcontext():
            try:
                yield
            finally:
                self._let_go(set(self._open))

    def advance(self, position: int) -> None:
        """Say that the samples fetched from now on belong to `position` of the needs or a later one."""
        need = None
        while self._next_need is not None and self._next_need.position <= position:
            need, self._next_need = self._next_need, next(self._needs, None)
        if self.remote and need is not None:
            self.remote.advance(position)
        if need is not None:
            self._let_go(self._open.keys() - set(need.shards))

    def _let_go(self, numbers: set[int]) -> None:
        """Forget shards; each mapping ends with the last image that still lies in it."""
        for number in numbers:
            del self._open[number]
            if self.remote:
                self.remote.let_go(number)

    def fetch(self, positions: Positions, with_text: bool) -> FetchedBatch:
        """The samples at `positions`, in order. Raises WorkError naming the shard and sample that is damaged."""
        images, labels, texts = [], np.empty(len(positions), np.int64), []
        for i, (number, place) in enumerate(zip(positions.shard.tolist(), positions.place.tolist(), strict=True)):
            shard = self._shard(number)
            sample = shard.samples[place]
            image = sample.image()
            if image is None or "cls" not in sample.members:
                raise WorkError(f"{shard.path}: sample {place} ({sample.key}) has no image or no class")
            images.append(_content(shard, image))
            labels[i] = self._label(shard, sample)
            if with_text:
                text = sample.members.get("txt")
                texts.append("" if text is None else bytes(_content(shard, text)).decode("utf-8", "replace").strip())
        return FetchedBatch(images, labels, texts)

    def name(self, shard: int, place: int) -> str:
        """How messages call a sample: SHARD:KEY."""
        opened = self._shard(shard)
        return f"{self.split.shards[shard].file}:{opened.samples[place].key or place}"

    def _label(self, shard: OpenShard, sample: TarSample) -> int:
        digits = bytes(_content(shard, sample.members["cls"])).strip()
        if not digits.isdigit() or int(digits) >= self.num_classes:
            raise WorkError(
                f"{shard.path}: class of {sample.key} is {digits[:20]!r}, not a number below {self.num_classes}; "
                "check the set with `python -m shards verify`"
            )
        return int(digits)

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            self._open[number] = self._open_shard(number)
        return self._open[number]

    def _open_shard(self, number: int) -> OpenShard:
        info = self.split.shards[number]
        path = self.remote.path(number) if self.remote else self.root / info.file
        cure = "check the set with `python -m shards verify`"
        try:
            with self.remote.open(number) if self.remote else open(path, "rb") as file:
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise WorkError(f"{path}: cannot be read ({error}); {cure}") from None
        if len(content) != info.bytes:
            raise WorkError(f"{path}: {len(content)} bytes, the manifest says {info.bytes}; {cure}")
        samples = self.remote.index(number) if self.remote else read_index(path)
        if len(samples) != info.samples:
            raise WorkError(f"{index_path(path)}: {len(samples)} samples, the manifest says {info.samples}; {cure}")
        return OpenShard(path, content, samples)


def _content(shard: OpenShard, member: Member) -> NDArray[np.uint8]:
    """The member's bytes, after a look at the tar header before them: a wrong index must not give wrong samples."""
    header = shard.content[max(member.offset - 512, 0) : member.offset].tobytes()
    if (
        len(header) != 512
        or header[257:262] != b"ustar"
        or int(header[124:136].rstrip(b" \0") or b"0", 8) != member.size
    ):
        raise WorkError(
            f"{index_path(shard.path)}: points to offset {member.offset}, where the tar has no such file; "
            "write it again with `python -m shards verify --fix-index`"
        )
    return shard.content[member.offset : member.offset + member.size]
