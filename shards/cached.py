"""A shard set of a folder of images, built once into a cache: what training does with `--data.shards my_images/`.

The set lies in CACHE/NAME-KEY. KEY stands for the options and for every image's name, class, split, tags, size and time
of change: as long as these are the same the set is used again, and else another one is built beside it. The same images
give the same set, byte for byte, on every host.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_train.data.manifest import MANIFEST_NAME, read_manifest
from dist_train.errors import UseError
from shards.build import build_shard_set
from shards.plan import BuildOptions
from shards.records import FileContent, LeftOut, Record
from shards.sources import read_source

_KEY_DIGITS = 16


def cached_shard_set(source: Path, cache: Path, options: BuildOptions) -> Path:
    """The folder in `cache` of the set of a source of images; builds it, or completes it, where it is not there.

    Says on stderr which set it is and whether it is built. Of several processes that ask for one set the first builds
    it and the others wait. Raises UseError where the source has no images or the cache cannot be written, and
    what `build_shard_set` raises.
    """
    found = read_source(source, out=cache)
    out = cache / f"{re.sub(r'[^A-Za-z0-9._-]', '_', source.absolute().name)[:40]}-{_key(found, options)}"
    with _one_at_a_time(out):
        if (out / MANIFEST_NAME).exists():
            manifest = read_manifest(out)
            samples = sum(split.samples for split in manifest.splits.values())
            if os.environ.get("LOCAL_RANK", "0") == "0":  # of the ranks of a host, which all ask, one says so
                _say(f"{source}: unchanged since the shard set {out} was built of it ({samples:,} images)")
            return out
        records = [item for item in found if isinstance(item, Record)]
        classes = len({record.class_name for record in records})
        how = options.transform or "images keep their size"
        _say(
            f"{source}: building a shard set of {len(records):,} images in {classes:,} classes ({how}) into {out} "
            "(once: it is used again until the images change)"
        )
        build_shard_set(found, out, options)
    return out


def _key(found: Sequence[Record | LeftOut], options: BuildOptions) -> str:
    """Changes with anything that may change the set."""
    digest = hashlib.sha256(json.dumps(options.settings(), sort_keys=True).encode())
    lines = [
        json.dumps(
            [item.name, item.class_name, item.split, item.tags, *_as_on_disk(item)]
            if isinstance(item, Record)
            else [item.name, item.reason]
        )
        for item in found
    ]
    for line in sorted(lines):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:_KEY_DIGITS]


def _as_on_disk(record: Record) -> list[int]:
    """Size in bytes and time of change of an image's file, in ns; nothing where it is not there."""
    try:
        status = os.stat(record.read.path) if isinstance(record.read, FileContent) else None
    except OSError:
        status = None
    return [status.st_size, status.st_mtime_ns] if status else []


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Hold the lock beside the folder `out`, waiting for who has it. It ends with the process, however that ends."""
    try:
        out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(out.with_name(f".{out.name}.lock"), "w")
    except OSError as error:
        raise UseError(f"{out.parent}: cannot hold shard sets ({error.strerror}); set data.cache to a folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{out}: waiting for the process that builds it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UseError(
                f"{out.parent}: its file system has no locks ({error.strerror}); set data.cache to a folder on another"
            ) from None
        yield


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
