"""Which samples make batch k: pure arithmetic over per-shard counts, no I/O.

An epoch's order, for a split of N samples, S streams and shuffle windows of W samples:

1. shards are permuted by (seed, epoch); their samples, end to end, form a line of N places;
2. the line is cut into S contiguous ranges of equal length (+-1), wherever shards begin and end;
3. each range is shuffled within windows of W places by (seed, epoch, stream, window);
4. position p of the epoch takes the next sample of stream p mod S.

The run is the concatenation of its epochs: global batch k is its positions [kB, (k+1)B), so no batch is short, nothing
is dropped and nothing repeats within an epoch. Every quantity is computed from the position alone, so any step costs
the same to resume at, and the plan's memory is a few numbers per shard and the windows in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_train.data.draws import Draw, permutation
from dist_train.errors import UseError

# Streams chosen by themselves: enough that a rank with 8 samples of a batch or more has its own, and few enough that a
# single node does not have too many shards open at once.
FEWEST_AUTO_STREAMS = 64
SAMPLES_PER_AUTO_STREAM = 8
_SHUFFLED_AT_ONCE = 2**20  # samples, to keep intermediate results small
_LOCATED_AT_ONCE = 4096  # samples of a rank: of small batches several, which take hardly longer than one


@dataclass(frozen=True)
class Positions:
    """Some positions of the run and the samples they hold; arrays of equal length.

    epoch and sample (the index in the manifest's order) identify a sample's turn; shard and place say where it lies.
    """

    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]
    shard: NDArray[np.int64]
    place: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> Positions:
        return Positions(self.epoch[chosen], self.sample[chosen], self.shard[chosen], self.place[chosen])


class Need(NamedTuple):
    """From this position on (until that of the next need) a reader takes samples of these shards alone.

    position counts as its maker says; shards are in the order of first use.
    """

    position: int
    shards: tuple[int, ...]


def choose_streams(batch_size: int, streams: int) -> int:
    """The number of streams: `streams`, or if 0 the largest divisor of the batch size up to an eighth of it, or 64.

    Raises UseError where it does not divide the batch size: then a batch would not take equally from each stream.
    """
    if not streams:
        most = max(FEWEST_AUTO_STREAMS, batch_size // SAMPLES_PER_AUTO_STREAM)
        return max(divisor for divisor in _divisors(batch_size) if divisor <= most)
    if batch_size % streams:
        raise UseError(
            f"data.streams {streams} does not divide train.batch_size {batch_size}; "
            f"these do: {', '.join(map(str, _divisors(batch_size)))}"
        )
    return streams


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def rank_batch(global_batch: int, world_size: int) -> int:
    """Samples of one global batch that each rank takes. Raises UseError where it does not divide."""
    if global_batch % world_size:
        below, above = global_batch // world_size * world_size, -(-global_batch // world_size) * world_size
        raise UseError(
            f"train.batch_size {global_batch} does not divide over {world_size} ranks; "
            f"use {f'{below} or ' if below else ''}{above}, or another number of ranks"
        )
    return global_batch // world_size


def micro_batches(global_batch: int, world_size: int, even: bool = False) -> list[int]:
    """Micro-batches, ascending, into which the share of a rank can be divided. even: into pairs of samples too.

    Raises UseError as `rank_batch`.
    """
    return [size for size in _divisors(rank_batch(global_batch, world_size)) if not even or size % 2 == 0]


def micro_batch_of(global_batch: int, world_size: int, micro_batch: int | Literal["auto"] = 0) -> int:
    """Samples of one forward pass of a rank; micro_batch 0 is the rank's whole share of the global batch.

    Raises UseError, naming the numbers that would do, where the batch does not divide; and for `auto`, for which a run
    has a number before it divides anything.
    """
    share = rank_batch(global_batch, world_size)
    if micro_batch == "auto":
        raise UseError("train.micro_batch_size auto is for training and its --dry-run, which find it; give a number")
    if micro_batch and share % micro_batch:
        raise UseError(
            f"train.micro_batch_size {micro_batch} does not divide the {share} samples that each of {world_size} ranks "
            f"takes of train.batch_size {global_batch}; "
            f"these do: {', '.join(map(str, _divisors(share)))}"
        )
    return micro_batch or share


class EpochPlan:
    """The order of one split, epoch after epoch.

    shard_samples: samples of each shard in the manifest's order. batch_size: the global batch.
    """

    def __init__(
        self, shard_samples: Sequence[int], batch_size: int, seed: int, streams: int = 0, shuffle_window: int = 4096
    ) -> None:
        self.counts = np.asarray(shard_samples, np.int64)
        self.samples = int(self.counts.sum())
        if self.samples == 0:
            raise UseError("the split to train on holds no samples")
        self.batch_size = batch_size
        self.seed = seed
        self.streams = choose_streams(batch_size, streams)
        self.window = shuffle_window
        self.first_sample = np.concatenate([[0], np.cumsum(self.counts)])
        self._lines: OrderedDict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], tuple[NDArray[np.int32], NDArray[np.bool_]]] = OrderedDict()

    def batch(self, consumed: int, rank: int = 0, world_size: int = 1) -> Positions:
        """What `rank` takes of the global batch after `consumed` samples of the run; batch_size / world_size samples.

        The batch's positions are ordered by stream and cut into equal parts, so a rank keeps to its own streams;
        only a batch in which one epoch ends and the next begins may hand it a few samples of its neighbour's.
        """
        return self._locate(*self._share(consumed, rank, world_size))

    def batches(self, consumed: int, rank: int = 0, world_size: int = 1) -> Iterator[Positions]:
        """What `batch` gives for the global batch after `consumed` samples of the run, and for each after it."""
        share = rank_batch(self.batch_size, world_size)
        steps = max(1, _LOCATED_AT_ONCE // share)
        while True:
            shares = [self._share(consumed + step * self.batch_size, rank, world_size) for step in range(steps)]
            located = self._locate(*(np.concatenate(part) for part in zip(*shares, strict=True)))
            for first in range(0, len(located), share):
                yield located[first : first + share]
            consumed += steps * self.batch_size

    def shards_ahead(self, consumed: int, rank: int = 0, world_size: int = 1, ranks: int = 1) -> Iterator[Need]:
        """Which shards the batches after `consumed` samples of the run touch, without end; positions are in samples.

        Those of `ranks` ranks together, from `rank` on. All streams enter a new window at the same position, so only
        the batches in which windows or epochs change are looked at. Uses nothing that `batch` changes: a thread of its
        own may run it.
        """
        lines: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        while True:
            epochs, positions = self._share(consumed, rank, world_size, ranks)
            streams, windows = positions % self.streams, positions // (self.streams * self.window)
            shape = int(epochs.max()) + 1, self.samples // (self.streams * self.window) + 1, self.streams
            turns = np.unique(np.ravel_multi_index((epochs, windows, streams), shape))
            turns = np.stack(np.unravel_index(turns, shape))
            lines = {epoch: lines.get(epoch) or self._make_line(epoch) for epoch in np.unique(epochs).tolist()}
            yield Need(consumed, tuple(dict.fromkeys(self._touched(turns, lines))))
            epoch, position = divmod(consumed, self.samples)
            window_end = (position // (self.streams * self.window) + 1) * self.streams * self.window
            change = epoch * self.samples + min(window_end, self.samples)
            consumed += max(1, (change - consumed) // self.batch_size) * self.batch_size

    def _touched(
        self, turns: NDArray[np.int64], lines: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> Iterator[int]:
        """Shards that lie under windows of streams, in the line's order. turns: (3, n) epochs, windows, streams."""
        for epoch in np.unique(turns[0]).tolist():
            order, starts = lines[epoch]
            window, stream = turns[1:, turns[0] == epoch]
            begin, length = self._stream_range(stream)
            ends = begin + window * self.window, begin + np.minimum((window + 1) * self.window, length) - 1
            for first, last in (np.searchsorted(starts, ends, side="right") - 1).T.tolist():
                yield from order[first : last + 1].tolist()

    def _share(
        self, consumed: int, rank: int, world_size: int, ranks: int = 1
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epochs and positions in them that `ranks` ranks from `rank` on take of a global batch, ordered by stream."""
        share = rank_batch(self.batch_size, world_size)
        epoch, first = divmod(consumed, self.samples)
        if first + self.batch_size <= self.samples:  # the usual batch, within one epoch: without a look at all of it
            index = np.arange(rank * share, (rank + ranks) * share)
            stream, turn = np.divmod(index, self.batch_size // self.streams)
            return np.full_like(index, epoch), first + (stream - first) % self.streams + turn * self.streams
        run_positions = np.arange(consumed, consumed + self.batch_size, dtype=np.int64)
        epochs, positions = np.divmod(run_positions, self.samples)
        mine = np.argsort(positions % self.streams, kind="stable")[rank * share : (rank + ranks) * share]
        return epochs[mine], positions[mine]

    def _locate(self, epochs: NDArray[np.int64], positions: NDArray[np.int64]) -> Positions:
        shard = np.empty_like(positions)
        place = np.empty_like(positions)
        for epoch, chosen in _by_number(epochs):
            order, starts = self._line(epoch)
            line = self._line_places(epoch, positions[chosen])
            turn = np.searchsorted(starts, line, side="right") - 1
            shard[chosen] = order[turn]
            place[chosen] = line - starts[turn]
        return Positions(epochs, self.first_sample[shard] + place, shard, place)

    def _line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards in the epoch's order, without the empty ones, and the place in the line where each begins."""
        if epoch not in self._lines:
            self._lines[epoch] = self._make_line(epoch)
            while len(self._lines) > 2:  # a batch sees at most the end of one epoch and the beginning of the next,
                self._lines.popitem(last=False)  # but for splits smaller than a batch, which are cheap
        return self._lines[epoch]

    def _make_line(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = permutation(len(self.counts), self.seed, Draw.SHARDS, epoch)
        order = order[self.counts[order] > 0]
        return order, np.cumsum(self.counts[order]) - self.counts[order]

    def _stream_range(self, stream: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where streams begin in the line, and their lengths."""
        short, longer = divmod(self.samples, self.streams)  # the first `longer` streams hold one sample more
        return stream * short + np.minimum(stream, longer), short + (stream < longer)

    def _line_places(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places in the epoch's line that the positions take: steps 2 to 4 of the module's description."""
        stream, turn = positions % self.streams, positions // self.streams
        begin, _ = self._stream_range(stream)
        window, offset = np.divmod(turn, self.window)
        places = begin + window * self.window
        for number, chosen in _by_number(window):  # all streams are in one window, or on their way into the next
            shuffled = self._shuffled(epoch, number, stream[chosen])
            places[chosen] += shuffled[stream[chosen], offset[chosen]]
        return places

    def _shuffled(self, epoch: int, window: int, streams: NDArray[np.int64]) -> NDArray[np.int32]:
        """(all streams, window size): the shuffled offsets in that window of each stream.

        Only the rows of `streams`, and of what was asked for before, are filled in: a rank has few of the streams, and
        memory that nobody writes to is not taken.
        """
        if (epoch, window) in self._windows:
            self._windows.move_to_end((epoch, window))
        else:
            most = min(self.window, -(-self.samples // self.streams) - window * self.window)
            self._windows[epoch, window] = np.empty((self.streams, most), np.int32), np.zeros(self.streams, bool)
            while len(self._windows) > 2:  # a batch may sit across two windows of every stream
                self._windows.popitem(last=False)
        shuffled, known = self._windows[epoch, window]
        if known[streams].all():
            return shuffled
        fresh = np.unique(streams[~known[streams]])
        sizes = np.minimum(self._stream_range(fresh)[1] - window * self.window, self.window)
        for size in np.unique(sizes).tolist():  # one, or two in the last window
            same = fresh[sizes == size]
            for some in np.array_split(same, -(-len(same) * size // _SHUFFLED_AT_ONCE)):
                shuffled[some, :size] = permutation(size, self.seed, Draw.WINDOWS, epoch, some[:, None], window)
        known[fresh] = True
        return shuffled


def _by_number(numbers: NDArray[np.int64]) -> Iterator[tuple[int, slice | NDArray[np.bool_]]]:
    """Each number that there is, ascending, and where it stands. Most often it is one."""
    if (numbers == numbers[0]).all():
        yield int(numbers[0]), slice(None)
        return
    for number in np.unique(numbers).tolist():
        yield number, numbers == number


def evaluation_batches(shard_samples: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[Positions]:
    """A rank's batches of an evaluation: the split in order, each sample exactly once over all ranks.

    Ranks take contiguous ranges of equal length (+-1), cut into batches of `batch_size`; every rank has the same number
    of batches, so the last may be short or empty.
    """
    counts = np.asarray(shard_samples, np.int64)
    total = int(counts.sum())
    first_sample = np.concatenate([[0], np.cumsum(counts)])
    begin, end = rank * total // world_size, (rank + 1) * total // world_size
    longest = -(-total // world_size)
    batches = []
    for start in range(begin, begin + longest, batch_size):
        sample = np.arange(start, max(start, min(start + batch_size, end)), dtype=np.int64)
        shard = np.searchsorted(first_sample, sample, side="right") - 1
        batches.append(Positions(np.zeros_like(sample), sample, shard, sample - first_sample[shard]))
    return batches


def needs_of(batches: Sequence[Positions]) -> Iterator[Need]:
    """The shards of each batch; positions are their numbers."""
    return (Need(i, tuple(np.unique(positions.shard).tolist())) for i, positions in enumerate(batches))
