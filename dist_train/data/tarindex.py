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
import tarfile
from dataclasses import dataclass
from pathlib import Path

from dist_train.data.manifest import write_atomically
from dist_train.errors import WorkError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Member:
    """Content of one file in a tar: place and length in bytes."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarSample:
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

    Directories, links and names that begin with a dot are not samples. damaged: make do with what can still be found;
    then nothing is raised, damaged headers are passed over, and what a cut tar no longer holds whole is left out.
    """
    samples: list[TarSample] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", ignore_zeros=damaged) as tar:
            size_of_file = os.fstat(file.fileno()).st_size
            for entry in tar:
                key, extension = split_name(entry.name)
                if not entry.isreg() or not extension or key.rpartition("/")[2] == "":
                    continue
                if not 0 <= entry.size <= size_of_file - entry.offset_data:
                    raise WorkError(f"{path}: cut short inside {entry.name}")
                if not samples or samples[-1].key != key or extension in samples[-1].members:
                    samples.append(TarSample(key, {}))
                samples[-1].members[extension] = Member(entry.offset_data, entry.size)
            file.seek(tar.offset)
            after_members = file.read(512)  # tarfile ends in silence at a header that is none
        if len(after_members) < 512:
            raise WorkError(f"{path}: cut short after {len(samples)} samples (no end-of-archive block)")
        if any(after_members):
            raise WorkError(f"{path}: damaged after {len(samples)} samples, at offset {tar.offset}")
    except WorkError:
        if not damaged:
            raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:  # ValueError: extended headers full of nonsense
        if not damaged:
            raise WorkError(f"{path}: not a readable tar ({error})") from None
    return samples


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


def read_index(tar: Path) -> list[TarSample]:
    """Samples according to the `.idx` beside `tar`. Raises WorkError naming the file if it is missing or malformed."""
    path = index_path(tar)
    cure = "write it again with `python -m shards verify --fix-index`"
    try:
        lines = path.read_bytes().decode(errors="surrogateescape").removesuffix("\n").split("\n")
        version, count = lines[0].split()
        fields_each = {"v1.2": 4, "v1.1": 3}[version]
        samples = []
        for line in lines[1:]:
            fields = line.split(" ")
            if not fields or len(fields) % fields_each:
                raise ValueError(f"line {len(samples) + 2} has {len(fields)} fields")
            members = {
                fields[i].lower(): Member(int(fields[i + 1]), int(fields[i + 2]))
                for i in range(0, len(fields), fields_each)
            }
            key = split_name(fields[3])[0] if fields_each == 4 else ""
            samples.append(TarSample(key, members))
        if len(samples) != int(count):
            raise ValueError(f"{count} samples announced, {len(samples)} listed")
    except FileNotFoundError:
        raise WorkError(f"{path}: missing; {cure}") from None
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise WorkError(f"{path}: not an index of DALI's format ({error}); {cure}") from None
    return samples
