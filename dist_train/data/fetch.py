"""Sample bytes out of the shards: each tar is memory-mapped when first used, nothing is copied.

The reader of the plan keeps open only the shards that its current windows touch. A sample is looked at (`sample.py`)
when it is first fetched. What is wrong with one sample is reported beside the others, never raised. Images that are not
plain (`images.py`) are converted each time they are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorCPU

from dist_train.config import DataConfig
from dist_train.data.images import BadImage, decode, to_ppm
from dist_train.data.manifest import SplitInfo
from dist_train.data.plan import Need, Positions
from dist_train.data.readahead import open_shards
from dist_train.data.remote import IsStopped, never_stopped
from dist_train.data.sample import BadSample, Kind, NotWhereListed, check_image, check_size, find_sample, size_of_plain
from dist_train.data.shard import Shard

_NOTHING = TensorCPU(np.empty(0, np.uint8))


@dataclass(frozen=True)
class _OpenShard:
    """A shard and what is known of its samples, by place: images, class ids, tags, problems.

    images: None before the first look, then a view into the mapping, or empty where there is a problem and the class 0.
    They are DALI's own views: to make one each time a sample comes would cost as much as all else that is done for it.
    sizes: (height, width) of the images, where they are asked for. tags: of the samples whose tags were asked for. odd:
    the places of images that are not plain.
    """

    shard: Shard
    images: list[TensorCPU | None]
    labels: list[int]
    sizes: list[tuple[int, int]]
    tags: dict[int, str] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    odd: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class FetchedBatch:
    """Samples as they lie in the shards: encoded images (DALI's views into the mapping), class ids, lines of tags.

    problems: by place in the batch, why a sample cannot be used; its image is empty and its class 0. odd: the places of
    images that DALI is not to see before they are converted. sizes: (B, 2), height and width of the images, upright,
    where they were asked for; 0 for those to be converted and those with a problem.
    """

    images: list[TensorCPU]
    labels: NDArray[np.int64]
    texts: list[str]
    problems: dict[int, str] = field(default_factory=dict)
    odd: list[int] = field(default_factory=list)
    sizes: NDArray[np.int32] | None = None


class ShardFetcher:
    """Reads samples of one split of the shard set at `root`, a folder or URL.

    config: what it says of the cache and of max_pixels. baked: side of the square that every image was resized to, or
    None. ranks: of this node, which share the cache. threads: that convert odd images. texts_only: nobody will look at
    the images, so neither does this. with_sizes: batches have their images' sizes.
    """

    def __init__(
        self,
        root: str | Path,
        split: SplitInfo,
        num_classes: int,
        *,
        config: DataConfig | None = None,
        baked: int | None = None,
        ranks: int = 1,
        threads: int = 1,
        texts_only: bool = False,
        with_sizes: bool = False,
    ) -> None:
        config = config or DataConfig()
        self.split = split
        self.num_classes = num_classes
        self.max_pixels = config.max_pixels
        self.baked = baked
        self.texts_only = texts_only
        self.with_sizes = with_sizes
        self.shards = open_shards(root, config, split.shards, ranks)
        self._kinds: dict[int, bytearray] = {}  # of images, by shard and place, also of shards let go
        self._converters = ThreadPoolExecutor(threads, "convert")
        self._open: dict[int, _OpenShard] = {}
        self._needs: Iterator[Need] = iter(())
        self._next_need: Need | None = None
        self._stopped: IsStopped = never_stopped

    @contextmanager
    def following(self, needs: Callable[[], Iterator[Need]], stopped: IsStopped = never_stopped) -> Iterator[None]:
        """While this lasts, shards are let go when `needs` no longer names them; remote ones are read ahead.

        stopped: says that no sample is wanted any more; then a download that `fetch` waits for ends with Stopped.
        """
        self._stopped = stopped
        self._needs = needs()
        self._next_need = next(self._needs, None)
        with self.shards.reading_ahead(needs()):
            try:
                yield
            finally:
                self._let_go(set(self._open))

    def advance(self, position: int) -> None:
        """Say that the samples fetched from now on belong to `position` of the needs or a later one."""
        need = None
        while self._next_need is not None and self._next_need.position <= position:
            need, self._next_need = self._next_need, next(self._needs, None)
        if need is not None:
            self.shards.advance(position)
            self._let_go(self._open.keys() - set(need.shards))

    def _let_go(self, numbers: set[int]) -> None:
        """Forget shards; each mapping ends with the last image that still lies in it."""
        for number in numbers:
            del self._open[number]
            self.shards.let_go(number)

    def fetch(self, positions: Positions, with_text: bool) -> FetchedBatch:
        """The samples at `positions`, in order. Raises WorkError naming a shard that cannot be read at all."""
        images: list[TensorCPU] = []
        labels, texts, odd, sizes = [], [], [], []
        problems = {}
        # What this loop does is done for every sample of a run: look up what the first look found, and no more.
        for i, (number, place) in enumerate(zip(positions.shard.tolist(), positions.place.tolist(), strict=True)):
            opened = self._open.get(number) or self._open_shard(number)
            image = opened.images[place]
            if image is None or (with_text and place not in opened.tags):
                opened, image = self._look_at(opened, number, place, with_text)
            images.append(image)
            labels.append(opened.labels[place])
            if self.with_sizes:
                sizes.append(opened.sizes[place])
            if opened.problems and place in opened.problems:
                problems[i] = opened.problems[place]
            if opened.odd and place in opened.odd:
                odd.append(i)
            if with_text:
                texts.append("" if i in problems else opened.tags[place])
        known = np.array(sizes, np.int32) if self.with_sizes else None
        return FetchedBatch(images, np.array(labels, np.int64), texts, problems, odd, known)

    def convert(self, positions: Positions, batch: FetchedBatch, places: Sequence[int]) -> None:
        """Put what DALI reads into the given places of a batch; what has no picture becomes one of its problems.

        The converted images belong to this batch alone: kept with their shard they would fill the memory.
        """
        originals = [np.asarray(batch.images[i]) for i in places]
        for i, converted in zip(places, self._converters.map(self._converted, originals), strict=True):
            number, place = int(positions.shard[i]), int(positions.place[i])
            self._kinds[number][place] = Kind.ODD
            opened = self._open.get(number)
            if isinstance(converted, str):
                batch.problems[i], batch.images[i] = converted, _NOTHING
                if opened is not None:
                    opened.problems[place], opened.images[place] = converted, _NOTHING
                    opened.odd.discard(place)
            else:
                batch.images[i], size = converted
                if batch.sizes is not None:
                    batch.sizes[i] = size
                if opened is not None:
                    opened.odd.add(place)

    def _converted(self, encoded: NDArray[np.uint8]) -> tuple[TensorCPU, tuple[int, int]] | str:
        """The image as DALI reads it, with its height and width, or why there is none."""
        try:
            image = decode(encoded.tobytes(), self.max_pixels)
            check_size(*image.size, self.baked)
        except (BadImage, BadSample) as problem:
            return str(problem)
        return TensorCPU(np.frombuffer(to_ppm(image), np.uint8)), (image.height, image.width)

    def name(self, number: int, place: int) -> str:
        """How messages call a sample: SHARD:KEY, or SHARD:PLACE where the key is not known."""
        samples = (self._open.get(number) or self._open_shard(number)).shard.samples
        key = samples[place].key if place < len(samples) else ""
        return f"{self.split.shards[number].file}:{key or place}".encode(errors="backslashreplace").decode()

    def _look_at(self, opened: _OpenShard, number: int, place: int, with_text: bool) -> tuple[_OpenShard, TensorCPU]:
        """Find out image, class, tags and problems of a sample; its shard is opened again where its index is wrong."""
        try:
            found = find_sample(opened.shard, place, self.num_classes, with_text)
            kinds = self._kinds.setdefault(number, bytearray(len(opened.images)))
            if not self.texts_only:
                kinds[place] = kinds[place] or check_image(opened.shard, place, found, self.max_pixels, self.baked)
            if kinds[place] == Kind.ODD:
                opened.odd.add(place)
            elif self.with_sizes:
                opened.sizes[place] = size_of_plain(opened.shard, found)
            start, size = found.image
            image, opened.labels[place] = TensorCPU(opened.shard.content[start : start + size]), found.label
            if with_text:
                opened.tags[place] = found.tags
        except (BadSample, BadImage) as problem:
            if isinstance(problem, NotWhereListed) and not opened.shard.from_tar:
                opened = self._open_shard(number, trust_index=False)
                return self._look_at(opened, number, place, with_text)
            image, opened.problems[place], opened.tags[place] = _NOTHING, str(problem), ""
        opened.images[place] = image
        return opened, image

    def _open_shard(self, number: int, trust_index: bool = True) -> _OpenShard:
        shard, samples = self.shards.open(number, self._stopped, trust_index), self.split.shards[number].samples
        self._open[number] = _OpenShard(shard, [None] * samples, [0] * samples, [(0, 0)] * samples)
        return self._open[number]
