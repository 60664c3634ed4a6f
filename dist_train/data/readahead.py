"""The shards of one split at a URL: read ahead of their use in the plan's order, through the cache.

What a process reads ahead, together with what it reads now, stays below its share of the cache (the limit divided by
the ranks of the node), so ranks do not push out each other's shards. Only its
recent use keeps in the cache what was read ahead: a shard that some rank needs now can always take its place.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dist_train.config import DataConfig
from dist_train.data.cache import GB, NoRoom, ShardCache, default_folder
from dist_train.data.manifest import ShardInfo
from dist_train.data.plan import Need
from dist_train.data.remote import IsStopped, file_url, is_url, never_stopped
from dist_train.data.shard import LocalShards, Shard, Shards, map_tar
from dist_train.errors import UseError, WorkError

DOWNLOADS = 4  # at a time and process, each over its own connection
ROOM_POLL_S = 0.5
END_S = 3.0  # for the downloads under way when nobody wants them any more
FURTHEST_NEED = 64  # needs ahead of the current one that are looked at, as a plan has no end
CHECKED_NEEDS = 2000  # of a plan, before it starts: many epochs of a small set, one of a large one


def open_shards(root: str | Path, config: DataConfig, shards: Sequence[ShardInfo], local_world_size: int) -> Shards:
    """The shards of a set in a folder or, through the cache, at a URL, for one of the ranks of a node."""
    if not is_url(root):
        return LocalShards(Path(root), shards)
    folder = Path(config.cache).expanduser() if config.cache else default_folder()
    return RemoteShards(str(root), shards, ShardCache(folder, int(config.cache_gb * GB)), local_world_size)


class RemoteShards(Shards):
    """`Shards` of the set at the URL `root`; the cache is shared by `local_world_size` ranks of the node."""

    def __init__(self, root: str, shards: Sequence[ShardInfo], cache: ShardCache, local_world_size: int) -> None:
        self.root, self.shards, self.cache = root, shards, cache
        self.ranks = local_world_size
        self._ahead: _ReadAhead | None = None

    def url(self, number: int) -> str:
        """Where the shard comes from."""
        return file_url(self.root, self.shards[number].file)

    def open(self, number: int, stopped: IsStopped = never_stopped, trust_index: bool = True) -> Shard:
        """As `Shards.open`: verified, downloaded first if need be; its index was made from the tar itself."""
        info = self.shards[number]
        path = self.cache.path(info)
        tar = map_tar(path, lambda: self.cache.open(self.url(number), info, stopped))
        try:
            samples = self.cache.index(info)
        except WorkError as error:
            raise WorkError(f"{self.url(number)}: damaged before it was uploaded: {error}") from None
        return Shard(path, tar, np.frombuffer(tar, np.uint8), samples, from_tar=True, checksums=None)

    def let_go(self, number: int) -> None:
        """As `Shards.let_go`: unless the shard comes again soon, it is the first to make room."""
        if self._ahead is None or not self._ahead.wants(number):
            self.cache.let_go(self.shards[number])

    @contextmanager
    def reading_ahead(self, needs: Iterator[Need]) -> Iterator[None]:
        """As `Shards.reading_ahead`: in threads that download."""
        self._ahead = _ReadAhead(self, needs)
        try:
            yield
        finally:
            self._ahead.stop()
            self._ahead = None

    def advance(self, position: int) -> None:
        """As `Shards.advance`."""
        if self._ahead is not None:
            self._ahead.advance(position)

    def check_room(self, needs: Iterator[Need], under_way: int) -> None:
        """As `Shards.check_room`: whether the cache is large enough."""
        total = sum(shard.bytes for shard in self.shards)
        if total <= self.cache.limit:
            return
        in_use: deque[Need] = deque()
        most = 0
        for _, need in zip(range(CHECKED_NEEDS), needs, strict=False):
            while len(in_use) > 1 and in_use[1].position <= need.position - under_way:
                in_use.popleft()
            in_use.append(need)
            at_once = {number for one in in_use for number in one.shards}
            most = max(most, sum(self.shards[number].bytes for number in at_once))
        # One more on its way and one of an evaluation, for each rank.
        most = min(total, most + 2 * self.ranks * max(shard.bytes for shard in self.shards))
        if most > self.cache.limit:
            raise UseError(
                f"data.cache_gb {self.cache.limit / GB:.3g} is too small: the ranks of a node read from shards of "
                f"{most / GB:.3g} GB at once; set it to at least {1.01 * most / GB:.3g} (twice that reads ahead "
                "well), or lower data.streams or data.shuffle_window"
            )


class _ReadAhead:
    """Threads that download what `needs` names, ahead of the reader."""

    def __init__(self, remote: RemoteShards, needs: Iterator[Need]) -> None:
        self.remote, self.needs = remote, needs
        self.share = remote.cache.limit // remote.ranks
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._positions: deque[int] = deque()  # of the needs looked at, from the current one on
        self._current = 0  # number of the first of them
        self._waiting: dict[int, int] = {}  # shards to download, in order, each with the last need that names it
        self._claimed: dict[int, int] = {}  # those downloaded or on their way, until their last need has passed
        self._threads = [threading.Thread(target=self._work, name="read-ahead", daemon=True) for _ in range(DOWNLOADS)]
        for thread in self._threads:
            thread.start()

    def wants(self, number: int) -> bool:
        """Whether a need that was looked at names the shard."""
        with self._changed:
            return number in self._claimed or number in self._waiting

    def advance(self, position: int) -> None:
        """Give up what only needs before that of `position` name."""
        with self._changed:
            before = self._current
            while self._look_two() and self._positions[1] <= position:
                self._positions.popleft()
                self._current += 1
            if self._current > before:
                for shards in (self._waiting, self._claimed):
                    for number in [number for number, last in shards.items() if last < self._current]:
                        del shards[number]
                self._changed.notify_all()

    def stop(self) -> None:
        """End the threads; a download under way ends at its next bytes, or is left alone if none come soon."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _look_two(self) -> bool:
        while len(self._positions) < 2:
            if not self._look_further():
                return False
        return True

    def _look_further(self) -> bool:
        need = next(self.needs, None)
        if need is None:
            return False
        number = self._current + len(self._positions)
        self._positions.append(need.position)
        for shard in need.shards:
            (self._claimed if shard in self._claimed else self._waiting)[shard] = number
        return True

    def _work(self) -> None:
        while (number := self._claim()) is not None:
            while not self._stopped.is_set():
                try:
                    file = self.remote.cache.try_open(
                        self.remote.url(number), self.remote.shards[number], self._stopped.is_set
                    )
                    if file is not None:
                        file.close()
                    break
                except NoRoom:
                    self._stopped.wait(ROOM_POLL_S)
                except Exception:  # said by the reader, if the shard still fails when it is needed
                    break

    def _claim(self) -> int | None:
        """The next shard to download; waits until there is one within the share. None: stopped."""
        with self._changed:
            while not self._stopped.is_set():
                while not self._waiting and len(self._positions) < FURTHEST_NEED and self._look_further():
                    pass
                if self._waiting:
                    number = next(iter(self._waiting))
                    claimed = sum(self.remote.shards[other].bytes for other in self._claimed)
                    if claimed + self.remote.shards[number].bytes <= self.share:
                        self._claimed[number] = self._waiting.pop(number)
                        return number
                self._changed.wait()
        return None
