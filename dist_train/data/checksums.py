"""A checksum of each sample, in the `.crc` file beside its tar: what was damaged since the set was made is found.

    crc32 v1 NUMBER_OF_SAMPLES BYTES_OF_THE_TAR CRC
    CRC of the first sample
    ...

Each CRC is a CRC-32 (zlib's) as eight hexadecimal digits: of a sample's image, class and tags, one after the other, and
in the first line of all lines that follow. A manifest's SHA-256 of a whole tar cannot be checked before the whole tar
has been read; this can, sample by sample, as they are read.
"""

from __future__ import annotations

import logging
import mmap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_train.data.tarindex import TarSample
from dist_train.files import write_atomically

log = logging.getLogger(__name__)


def checksums_path(tar: Path) -> Path:
    """The `.crc` file that belongs to a tar."""
    return tar.with_suffix(".crc")


def sample_checksum(content: Any, sample: TarSample) -> int:
    """CRC-32 of what is read of a sample. content: the tar's bytes, anything that can be sliced."""
    value = 0
    for found in (sample.image(), sample.find("cls"), sample.find("txt")):
        if found is not None:
            member = found[1]
            value = zlib.crc32(content[member.offset : member.offset + member.size], value)
    return value


def compute_checksums(tar: Path, samples: Sequence[TarSample]) -> list[int]:
    """The checksums of all samples of a tar as it now is. Raises OSError."""
    with open(tar, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as view:
            return [sample_checksum(view, sample) for sample in samples]


def write_checksums(tar: Path, checksums: Sequence[int]) -> None:
    """Write the `.crc` beside `tar`, which is complete, atomically."""
    lines = "".join(f"{value:08x}\n" for value in checksums).encode()
    header = f"crc32 v1 {len(checksums)} {tar.stat().st_size} {zlib.crc32(lines):08x}\n".encode()
    write_atomically(checksums_path(tar), header + lines)


def read_checksums(tar: Path, samples: int, size: int) -> NDArray[np.uint32] | None:
    """(samples,) checksums of a tar of `size` bytes; None where there is no `.crc`.

    Also None, with a warning, where the `.crc` is damaged or not of such a tar.
    """
    path = checksums_path(tar)
    try:
        header, _, lines = path.read_bytes().partition(b"\n")
        if header != f"crc32 v1 {samples} {size} {zlib.crc32(lines):08x}".encode():
            raise ValueError(f"damaged, or not of {samples} samples in {size} bytes")
        return np.frombuffer(bytes.fromhex(lines.decode()), ">u4")  # blanks and line ends are passed over
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: %s; samples are read unchecked, write it again with `verify --fix-index`", path, error)
        return None
