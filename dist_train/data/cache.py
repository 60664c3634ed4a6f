"""A bounded folder of downloaded shards, shared by the processes of a machine.

    SHA256.tar     a whole shard, verified before it got this name; equal shards of two sets are one file
    SHA256.idx     where its samples lie, made from the tar
    SHA256.part    a shard that is being downloaded, at its full size from the start
    cache.lock     held while the folder's content changes, never during a download

Every lock is a flock, which ends with its process, so a killed process leaves nothing but a .part, which the next one
removes. A reader holds a shared lock on its tar, a download an exclusive lock on its .part; files that nobody holds may
be removed: first those that their readers have left behind, then the least recently used. The lock on a tar belongs to
the open file, which its mapping keeps open: it ends with the last view of the mapping.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from dist_train.data.manifest import ShardInfo
from dist_train.data.remote import IsStopped, Stopped, download, never_stopped
from dist_train.data.tarindex import TarSample, format_index, index_path, index_tar, open_index
from dist_train.errors import UseError, WorkError
from dist_train.files import write_atomically

GB = 10**9
POLL_S = 0.02  # between two looks at what another process does
PATIENCE_S = 30.0  # how long a shard that is needed now waits for others to let go of theirs
_OURS = re.compile(r"\.?[0-9a-f]{64}\.(tar|idx|part|idx\.\d+\.tmp)")


class NoRoom(Exception):
    """Removing all that may be removed would not make room for a shard. changing: a download may change that."""

    def __init__(self, changing: bool) -> None:
        self.changing = changing


def default_folder() -> Path:
    """Where shards are kept if the recipe does not say."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dist-train" / "shards"


class ShardCache:
    """The folder; any number of threads and processes may have one for the same folder. limit: in bytes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                pass
        except OSError as error:
            raise UseError(f"{folder}: cannot hold shards ({error.strerror}); set data.cache to a folder") from None

    def open(self, url: str, shard: ShardInfo, stopped: IsStopped = never_stopped) -> IO[bytes]:
        """The shard, downloaded if it must be; it stays in the cache until the file and its mappings are closed.

        Waits where another process downloads it. Raises WorkError naming the URL or the folder, and the cure; Stopped
        soon after `stopped()` is true.
        """
        waiting_since = time.monotonic()
        while True:
            try:
                if (file := self.try_open(url, shard, stopped)) is not None:
                    return file
                waiting_since = time.monotonic()
            except NoRoom as full:
                if full.changing:
                    waiting_since = time.monotonic()
                if time.monotonic() - waiting_since > PATIENCE_S or shard.bytes > self.limit:
                    raise WorkError(
                        f"{url}: needs {shard.bytes / GB:.3g} GB in {self.folder}, where shards in use fill "
                        f"data.cache_gb {self.limit / GB:.3g}; set it to at least "
                        f"{(self.limit + 2 * shard.bytes) / GB:.3g}"
                    ) from None
            if stopped():
                raise Stopped
            time.sleep(POLL_S)

    def try_open(self, url: str, shard: ShardInfo, stopped: IsStopped = never_stopped) -> IO[bytes] | None:
        """The same without waiting: None while another downloads the shard; raises NoRoom, and Stopped if told to."""
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise WorkError(f"{url}: its SHA-256 in the manifest is none: {shard.sha256[:70]!r}")
        try:
            if (file := self._open_entry(shard)) is not None:
                return file
            return self._download(url, shard, stopped)
        except OSError as error:
            raise WorkError(f"{self.folder}: cannot hold {url} ({error.strerror or error})") from None

    def index(self, shard: ShardInfo) -> Sequence[TarSample]:
        """Where the samples of an opened shard lie."""
        try:
            return open_index(self.path(shard))
        except WorkError:
            return index_tar(self.path(shard))

    def let_go(self, shard: ShardInfo) -> None:
        """Say that a shard is not needed soon: it is the first to be removed."""
        with suppress(OSError):  # another process has removed it already
            os.utime(self.path(shard), (0, 0))

    def path(self, shard: ShardInfo) -> Path:
        """Where the shard lies, if it does."""
        return self.folder / f"{shard.sha256}.tar"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "cache.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _open_entry(self, shard: ShardInfo) -> IO[bytes] | None:
        """The whole shard if it is there, under a shared lock."""
        with self._locked():
            try:
                file = open(self.path(shard), "rb")
            except FileNotFoundError:
                return None
            if os.fstat(file.fileno()).st_size != shard.bytes:
                file.close()
                self.path(shard).unlink()
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(self.path(shard))
            return file

    def _download(self, url: str, shard: ShardInfo, stopped: IsStopped) -> IO[bytes] | None:
        part = self.path(shard).with_suffix(".part")
        with ExitStack() as undo:
            file = undo.enter_context(os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b"))
            if not _lock_alone(file) or not _is_at(file, part):
                return None  # another has it, or finished or removed it between our opening and our lock
            undo.callback(self._remove_part, part)
            if self.path(shard).exists():
                return None  # finished just before our opening
            self._reserve(file, shard.bytes)
            download(url, shard.bytes, shard.sha256, file, stopped)
            self._keep(shard, file, part)
            undo.pop_all()
            return file

    def _remove_part(self, part: Path) -> None:
        with self._locked():
            part.unlink(missing_ok=True)

    def _reserve(self, file: IO[bytes], size: int) -> None:
        """Give the locked .part `size` bytes of the limit and of the disk. Raises NoRoom, or WorkError: disk full."""
        with self._locked():
            os.ftruncate(file.fileno(), 0)  # what a killed process left
            self._make_room(size)
            os.ftruncate(file.fileno(), size)  # from here on it counts
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            os.ftruncate(file.fileno(), 0)  # so that `free` is what was free
            raise WorkError(
                f"{self.folder}: no room for a shard of {size:,} bytes, {shutil.disk_usage(self.folder).free:,} are "
                f"free ({error.strerror}); free some, set data.cache to another disk, or lower data.cache_gb so that "
                "older shards go in time"
            ) from None

    def _keep(self, shard: ShardInfo, file: IO[bytes], part: Path) -> None:
        """Make the downloaded .part an entry, with its index; its exclusive lock becomes a shared one."""
        file.flush()
        os.fsync(file.fileno())
        try:
            index = format_index(index_tar(part))
        except WorkError:
            index = None  # the tar was damaged before it came into the set; its readers will say so
        with self._locked():
            if index is not None:
                with suppress(NoRoom):  # each reader then makes its own
                    self._make_room(len(index))
                    write_atomically(index_path(self.path(shard)), index)
            os.rename(part, self.path(shard))
            fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)

    def _make_room(self, size: int) -> None:
        """Remove leftovers of killed processes, then shards that nobody reads, until `size` bytes more are allowed."""
        used, changing = 0, False
        shards: list[tuple[float, Path]] = []
        for entry in list(os.scandir(self.folder)):
            path, stat = Path(entry.path), entry.stat()
            if not _OURS.fullmatch(entry.name) or not stat.st_size:
                continue
            abandoned = path.suffix == ".tmp" or (path.suffix == ".idx" and not path.with_suffix(".tar").exists())
            if abandoned or (path.suffix == ".part" and _nobody_holds(path)):
                path.unlink()
                continue
            used += stat.st_size
            changing |= path.suffix == ".part"
            if path.suffix == ".tar":
                shards.append((stat.st_mtime, path))
        for _, path in sorted(shards):
            if used + size <= self.limit:
                return
            if _nobody_holds(path):
                for file in (path, index_path(path)):
                    if file.exists():
                        used -= file.stat().st_size
                        file.unlink()
        if used + size > self.limit:
            raise NoRoom(changing)


def _lock_alone(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _nobody_holds(path: Path) -> bool:
    with open(path, "rb") as file:
        return _lock_alone(file)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
