"""Sample bytes out of the shards: each tar is memory-mapped when first used, nothing is copied.

The tars lie in a folder, or at a URL and then in the local cache; the reader of the plan keeps open only those that
its current windows touch.

A sample is looked at when it is first fetched: whether the tar has its members where the index says, whether they are
what its checksum says, what its class is, and what its image announces. What is wrong with one sample is reported
beside the others, never raised. Images that are not plain (`images.py`) are converted each time they are fetched.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU
from nvidia.nvimgcodec import CodeStream

from dist_train.config import DataConfig
from dist_train.data.checksums import checksums_path, read_checksums, sample_checksum
from dist_train.data.images import BadImage, Header, check_pixels, decode, read_header, to_ppm
from dist_train.data.manifest import ShardInfo, SplitInfo
from dist_train.data.plan import Need, Positions
from dist_train.data.readahead import RemoteShards
from dist_train.data.tags import tag_line
from dist_train.data.tarindex import Member, TarSample, index_path, index_tar, open_index
from dist_train.errors import WorkError

log = logging.getLogger(__name__)

_NOTHING = TensorCPU(np.empty(0, np.uint8))
_UNSEEN, _PLAIN, _ODD = range(3)  # what is known of an image


class _BadSample(Exception):
    """Why a sample cannot be used."""


class _NotWhereListed(_BadSample):
    """The tar has not what the list of its samples says."""


@dataclass(frozen=True)
class OpenShard:
    """A mapped tar, where its samples lie, and what is known of those looked at, by place: images, class ids, problems.

    from_tar: the samples were listed by reading the tar itself, not its index. checksums: of the samples, or None. odd:
    the places of images that are not plain. images: None before the first look, then
    a view into the mapping, or empty where there is a problem and the class 0. They are DALI's own views, as making one
    anew each time a sample comes costs as much as all else that is done for it.
    """

    path: Path
    content: NDArray[np.uint8]
    samples: Sequence[TarSample]
    from_tar: bool
    checksums: NDArray[np.uint32] | None
    images: list[TensorCPU | None]
    labels: list[int]
    problems: dict[int, str] = field(default_factory=dict)
    odd: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class FetchedBatch:
    """Samples as they lie in the shards: encoded images (DALI's views into the mapping), class ids, lines of tags.

    problems: by place in the batch, why a sample cannot be used; its image is empty and its class 0. odd: the places of
    images that DALI is not to see before they are converted.
    """

    images: list[TensorCPU]
    labels: NDArray[np.int64]
    texts: list[str]
    problems: dict[int, str] = field(default_factory=dict)
    odd: list[int] = field(default_factory=list)


class ShardFetcher:
    """Reads samples of one split of the shard set in the folder `root`, or of `remote` if given.

    threads: that convert odd images. texts_only: nobody will look at the images, so neither does this.
    """

    def __init__(
        self,
        root: str | Path,
        split: SplitInfo,
        num_classes: int,
        max_pixels: int = DataConfig.max_pixels,
        baked: int | None = None,
        remote: RemoteShards | None = None,
        threads: int = 1,
        texts_only: bool = False,
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.num_classes = num_classes
        self.max_pixels = max_pixels
        self.baked = baked
        self.remote = remote
        self.texts_only = texts_only
        self._seen: dict[int, bytearray] = {}  # by shard and place, also of shards let go: _PLAIN, _ODD or _UNSEEN
        self._converters = ThreadPoolExecutor(threads, "convert")
        self._open: dict[int, OpenShard] = {}
        self._needs: Iterator[Need] = iter(())
        self._next_need: Need | None = None
        self._stopped: Callable[[], bool] = lambda: False

    @contextmanager
    def following(
        self, needs: Callable[[], Iterator[Need]], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """While this lasts, shards are let go when `needs` no longer names them; remote ones are read ahead.

        stopped: says that no sample is wanted any more; then a download that `fetch` waits for ends with Stopped.
        """
        self._stopped = stopped
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
        """The samples at `positions`, in order. Raises WorkError naming a shard that cannot be read at all."""
        images, labels, texts, problems, odd = [], [], [], {}, []
        # What this loop does is done for every sample of a run: look up what the first look found, and no more.
        for i, (number, place) in enumerate(zip(positions.shard.tolist(), positions.place.tolist(), strict=True)):
            shard = self._open.get(number) or self._shard(number)
            if shard.images[place] is None:
                shard = self._look_at(shard, number, place, with_text)
            images.append(shard.images[place])
            labels.append(shard.labels[place])
            if shard.problems and place in shard.problems:
                problems[i] = shard.problems[place]
            if shard.odd and place in shard.odd:
                odd.append(i)
            if with_text:
                texts.append("" if i in problems else _text(shard, place))
        return FetchedBatch(images, np.array(labels, np.int64), texts, problems, odd)

    def convert(self, positions: Positions, batch: FetchedBatch, places: Sequence[int]) -> None:
        """Put what DALI reads into the given places of a batch; what has no picture becomes one of its problems.

        The converted images belong to this batch alone: kept with their shard they would fill the memory.
        """
        where = [(int(positions.shard[i]), int(positions.place[i])) for i in places]
        originals = [np.asarray(batch.images[i]) for i in places]
        for i, (number, place), converted in zip(
            places, where, self._converters.map(self._converted, originals), strict=True
        ):
            self._seen[number][place] = _ODD
            if isinstance(converted, str):
                batch.problems[i], batch.images[i] = converted, _NOTHING
                if (shard := self._open.get(number)) is not None:
                    shard.problems[place], shard.images[place] = converted, _NOTHING
                    shard.odd.discard(place)
            else:
                batch.images[i] = converted
                if (shard := self._open.get(number)) is not None:
                    shard.odd.add(place)

    def _converted(self, encoded: NDArray[np.uint8]) -> TensorCPU | str:
        """The image as DALI reads it, or why there is none."""
        try:
            image = decode(encoded.tobytes(), self.max_pixels)
            _check_size(*image.size, self.baked)
        except (BadImage, _BadSample) as problem:
            return str(problem)
        return TensorCPU(np.frombuffer(to_ppm(image), np.uint8))

    def name(self, shard: int, place: int) -> str:
        """How messages call a sample: SHARD:KEY, or SHARD:PLACE where the key is not known."""
        opened = self._shard(shard)
        key = opened.samples[place].key if place < len(opened.samples) else ""
        return f"{self.split.shards[shard].file}:{key or place}".encode(errors="backslashreplace").decode()

    def _look_at(self, shard: OpenShard, number: int, place: int, with_text: bool) -> OpenShard:
        """Find out image, class and problems of a sample; the shard is opened anew where its index turns out wrong."""
        try:
            shard.images[place], shard.labels[place] = self._check(shard, number, place, with_text)
        except _NotWhereListed as problem:
            if not shard.from_tar:
                self._open[number] = shard = self._open_shard(number, trust_index=False)
                return self._look_at(shard, number, place, with_text)
            shard.images[place], shard.problems[place] = _NOTHING, str(problem)
        except (_BadSample, BadImage) as problem:
            shard.images[place], shard.problems[place] = _NOTHING, str(problem)
        return shard

    def _check(self, shard: OpenShard, number: int, place: int, with_text: bool) -> tuple[TensorCPU, int]:
        """Encoded image and class id of a sample with nothing wrong. Raises _BadSample."""
        if place >= len(shard.samples):
            raise _NotWhereListed(f"not in the shard, which holds only {len(shard.samples)} samples")
        sample = shard.samples[place]
        image, label = sample.image(), sample.find("cls")
        if image is None:
            raise _NotWhereListed(f"has no image, or several (members: {', '.join(sample.members) or 'none'})")
        if label is None:
            raise _NotWhereListed("has no .cls")
        text = sample.find("txt") if with_text else None
        for found in (image, label, text):
            if found is not None:
                _check_header(shard, sample.key, *found)
        digits = bytes(_content(shard, label[1])[:40]).strip()
        if not digits.isdigit() or int(digits) >= self.num_classes:
            raise _BadSample(f"its class is {digits!r}, not a number below {self.num_classes}")
        encoded = _content(shard, image[1])
        if not self.texts_only and self._kind(shard, number, place, encoded) == _ODD:
            shard.odd.add(place)
        return TensorCPU(encoded), int(digits)

    def _kind(self, shard: OpenShard, number: int, place: int, encoded: NDArray[np.uint8]) -> int:
        """Whether an image is plain, found out once in the life of this process. Raises _BadSample, BadImage."""
        seen = self._seen.setdefault(number, bytearray(len(shard.images)))
        if seen[place] == _UNSEEN:
            if shard.checksums is not None:
                if sample_checksum(shard.content, shard.samples[place]) != shard.checksums[place]:
                    raise _BadSample(f"damaged: it is not what {checksums_path(shard.path).name} says")
            if (size := plain_size(encoded, self.max_pixels)) is not None:
                _check_size(*size, self.baked)
            seen[place] = _ODD if size is None else _PLAIN
        return seen[place]

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            self._open[number] = self._open_shard(number)
        return self._open[number]

    def _open_shard(self, number: int, trust_index: bool = True) -> OpenShard:
        info = self.split.shards[number]
        path = self.remote.path(number) if self.remote else self.root / info.file
        try:
            with self.remote.open(number, self._stopped) if self.remote else open(path, "rb") as file:
                content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError) as error:
            raise WorkError(f"{path}: cannot be read ({error}); check the set with `python -m shards verify`") from None
        if self.remote:
            samples, from_tar, checksums = self.remote.index(number), True, None  # its SHA-256 has been checked
        else:
            samples, from_tar = _list_samples(path, info, trust_index and len(content) == info.bytes)
            checksums = read_checksums(path, info.samples, info.bytes) if len(samples) == info.samples else None
        return OpenShard(path, content, samples, from_tar, checksums, [None] * info.samples, [0] * info.samples)


def _list_samples(path: Path, info: ShardInfo, trust_index: bool) -> tuple[Sequence[TarSample], bool]:
    """The samples of a shard, and whether the tar itself was read for them because its index is of no use."""
    listed: Sequence[TarSample] | None
    listed, problem = None, "does not match its tar"
    try:
        listed = open_index(path)
        if len(listed) != info.samples:
            listed, problem = None, f"lists {len(listed)} samples, the manifest {info.samples}"
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


def _check_header(shard: OpenShard, key: str, extension: str, member: Member) -> None:
    """Look at the tar header before a member: a wrong index must not give wrong samples. Raises _BadSample."""
    header = shard.content[max(member.offset - 512, 0) : max(member.offset, 0)].tobytes()
    if len(header) != 512 or header[257:262] != b"ustar" or _octal(header[124:136]) != member.size:
        raise _NotWhereListed(f"the tar has no .{extension} at offset {member.offset}: a damaged header, or a cut tar")
    if member.offset + member.size > len(shard.content):
        raise _NotWhereListed(f"its .{extension} is cut short")
    start = key.encode(errors="surrogateescape") + b"."
    if shard.from_tar or not key or header.startswith(start):
        return
    # Only short plain names stand in this header as they are; others are in the extended headers before it.
    if key.isascii() and len(start) + len(extension) <= 100 and not header[345:500].rstrip(b"\0"):
        raise _NotWhereListed(f"the tar has another file than {key}.{extension} at offset {member.offset}")


def plain_size(encoded: NDArray[np.uint8], max_pixels: int) -> tuple[int, int] | None:
    """(width, height) of an image that DALI may have as it is, by its header alone; None for one to be converted.

    What DALI's own parser does not take is not plain either: DALI 2.4 goes on reading freed memory, and often crashes,
    when it meets such a header in a batch that several threads share. Raises BadImage for too many pixels.
    """
    header = read_header(encoded.tobytes())
    if header is not None:
        check_pixels(header.width, header.height, max_pixels)
        if header.plain and _is_taken_by_dali(encoded, header):
            return header.width, header.height
    return None


def _is_taken_by_dali(encoded: NDArray[np.uint8], header: Header) -> bool:
    try:
        stream = CodeStream(encoded)
        return (stream.codec_name, stream.width, stream.height) == header[:3]
    except RuntimeError:
        return False


def _check_size(width: int, height: int, baked: int | None) -> None:
    if baked and (width, height) != (baked, baked):
        raise _BadSample(f"{width} x {height} pixels, but the manifest says that all were resized to {baked}x{baked}")


def _octal(digits: bytes) -> int:
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _content(shard: OpenShard, member: Member) -> NDArray[np.uint8]:
    return shard.content[member.offset : member.offset + member.size]


def _text(shard: OpenShard, place: int) -> str:
    text = shard.samples[place].find("txt")
    return "" if text is None else tag_line(bytes(_content(shard, text[1])).decode("utf-8", "replace"))
