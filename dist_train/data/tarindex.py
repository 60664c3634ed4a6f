"""Where each sample lies in a tar: made from the tar itself, or read from the `.idx` file beside it.

A sample is the run of neighbouring members that share a key; a member's key is its path up to the first dot of its
file name, its extension everything after (the webdataset convention). Where that whole extension says nothing, its last
part decides: `a.b.jpg` is an image, as the webdataset library's own decoders have it. The `.idx` is DALI's format:

    v1.2 NUMBER_OF_SAMPLES
    EXT OFFSET SIZE NAME [EXT OFFSET SIZE NAME ...]

one line a sample, offsets and sizes in bytes of the member's content. As the format splits at blanks, a tar with
blanks in its names gets version v1.1, which has no names (DALI reads both). Offsets come from `tarfile`, which is
right about GNU and PAX long names.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_train.errors import WorkError
from dist_train.files import write_atomically

# In the order of preference. What a file is its content decides; without one of these it counts as no image.
IMAGE_EXTENSIONS = tuple("jpg jpeg png webp jpe jfif mpo apng gif bmp dib tif tiff ppm pgm pbm pnm jp2 avif".split())
_BLOCK = 512  # a tar is made of blocks of this many bytes
_PLACE = r"[^ ]* -?\d{1,20} -?\d{1,20}"
_LINES = {
    version: re.compile(f"{member}(?: {member})*")
    for version, member in {"v1.2": f"{_PLACE} [^ ]*", "v1.1": _PLACE}.items()
}


class Member(NamedTuple):
    """Content of one file in a tar: place and length in bytes."""

    offset: int
    size: int


class TarSample(NamedTuple):
    """One sample: its key ("" if the index has no names) and its members by extension."""

    key: str
    members: dict[str, Member]

    def image(self) -> tuple[str, Member] | None:
        """The image member with its extension, or None where there is none, or several and nothing to choose by."""
        return self.find(*IMAGE_EXTENSIONS)

    def find(self, *extensions: str) -> tuple[str, Member] | None:
        """The first of `extensions` that the sample has, else the one member whose last extension is among them."""
        for extension in extensions:
            if extension in self.members:
                return extension, self.members[extension]
        alike = [item for item in self.members.items() if item[0].rpartition(".")[2] in extensions]
        return alike[0] if len(alike) == 1 else None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member's path: "a.dir/b.c.jpg" -> ("a.dir/b", "c.jpg")."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), "_".join(extension.lower().split())  # the index splits at blanks


def index_tar(path: Path, damaged: bool = False) -> list[TarSample]:
    """Samples of a tar in file order. Raises WorkError if the tar is damaged or cut short.

    Directories, links and names that begin with a dot are not samples. Of tars that were joined by `cat` all are read.
    damaged: make do with what can still be found; then nothing is raised, damaged headers are passed over, and what a
    cut tar no longer holds whole is left out.
    """
    samples: list[TarSample] = []
    try:
        with open(path, "rb") as file:
            start: int | None = 0
            while start is not None:
                end = _add_samples(path, file, start, samples, damaged)
                start = None if damaged else _next_archive(path, file, end)
    except WorkError:
        if not damaged:
            raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:  # wrong headers
        if not damaged:
            raise WorkError(f"{path}: not a readable tar ({error})") from None
    return samples


def _add_samples(path: Path, file: BinaryIO, start: int, samples: list[TarSample], damaged: bool) -> int:
    """Add the samples of the archive that begins at `start` to `samples`; returns where its end-of-archive block is."""
    file.seek(start)
    first = len(samples)  # what an earlier archive holds under the same key is another sample
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=damaged) as tar:
        size_of_file = os.fstat(file.fileno()).st_size
        for entry in tar:
            key, extension = split_name(entry.name)
            if not entry.isreg() or not extension or key.rpartition("/")[2] == "":
                continue
            if not 0 <= entry.size <= size_of_file - entry.offset_data:
                raise WorkError(f"{path}: cut short inside {entry.name}")
            if len(samples) == first or samples[-1].key != key or extension in samples[-1].members:
                samples.append(TarSample(key, {}))
            samples[-1].members[extension] = Member(entry.offset_data, entry.size)
        file.seek(tar.offset)
        after_members = file.read(_BLOCK)  # tarfile stops silently at an invalid header
    if len(after_members) < _BLOCK:
        raise WorkError(f"{path}: cut short after {len(samples)} samples (no end-of-archive block)")
    if any(after_members):
        raise WorkError(f"{path}: damaged after {len(samples)} samples, at offset {tar.offset}")
    return tar.offset


def _next_archive(path: Path, file: BinaryIO, end: int) -> int | None:
    """Where another archive begins behind the zeros that end one, None if nothing follows.

    Raises WorkError if what follows is no tar.
    """
    file.seek(end)
    while chunk := file.read(128 * _BLOCK):
        rest = chunk.lstrip(b"\0")
        if rest:
            start = end + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
            file.seek(start)
            if file.read(_BLOCK)[257:262] != b"ustar":
                raise WorkError(
                    f"{path}: after its end, at offset {start}, lies something that is no tar; pack it again"
                )
            return start
        end += len(chunk)
    return None


def index_path(tar: Path) -> Path:
    """The `.idx` file that belongs to a tar."""
    return tar.with_suffix(".idx")


def write_index(tar: Path, samples: list[TarSample]) -> None:
    """Write the `.idx` beside `tar`, atomically."""
    write_atomically(index_path(tar), format_index(samples))


def format_index(samples: list[TarSample]) -> bytes:
    """What the `.idx` of these samples holds."""
    with_names = not any(" " in sample.key or "\n" in sample.key for sample in samples)
    lines = [f"{'v1.2' if with_names else 'v1.1'} {len(samples)}"]
    for sample in samples:
        fields = []
        for extension, member in sample.members.items():
            fields += [extension, str(member.offset), str(member.size)]
            if with_names:
                fields.append(f"{sample.key}.{extension}")
        lines.append(" ".join(fields))
    return ("\n".join(lines) + "\n").encode(errors="surrogateescape")


class IndexedSamples(Sequence[TarSample]):
    """What the lines of an index say. A line is taken apart when its sample is asked for: a reader that opens many
    shards for its first batch uses few samples of each."""

    def __init__(self, lines: list[str], with_names: bool) -> None:
        self._lines, self._with_names = lines, with_names

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place: int) -> TarSample:  # type: ignore[override]  # no slices
        fields = self._lines[place].split(" ")
        each = 4 if self._with_names else 3
        members = {
            fields[i].lower(): Member(int(fields[i + 1]), int(fields[i + 2])) for i in range(0, len(fields), each)
        }
        return TarSample(split_name(fields[3])[0] if self._with_names else "", members)


def open_index(tar: Path) -> IndexedSamples:
    """Samples according to the `.idx` beside `tar`. Raises WorkError naming the file if it is missing or malformed."""
    path = index_path(tar)
    cure = "write it again with `python -m shards verify --fix-index`"
    try:
        header, *lines = path.read_bytes().decode(errors="surrogateescape").removesuffix("\n").split("\n")
        version, count = header.split()
        for number, line in enumerate(map(_LINES[version].fullmatch, lines), 2):
            if line is None:
                raise ValueError(f"line {number} has other fields")
        if len(lines) != int(count):
            raise ValueError(f"{count} samples announced, {len(lines)} listed")
    except FileNotFoundError:
        raise WorkError(f"{path}: missing; {cure}") from None
    except (OSError, ValueError, KeyError) as error:
        raise WorkError(f"{path}: not an index of DALI's format ({error}); {cure}") from None
    return IndexedSamples(lines, version == "v1.2")


def read_index(tar: Path) -> list[TarSample]:
    """The same, all taken apart."""
    return list(open_index(tar))
