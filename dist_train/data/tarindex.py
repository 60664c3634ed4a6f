"""Where each sample lies in a tar: made from the tar itself, or read from the `.idx` file beside it.

A sample is the run of neighbouring members that share a key; a member's key is its path up to the first dot of its
file name, its extension everything after (the webdataset convention). The `.idx` is DALI's format:

    v1.2 NUMBER_OF_SAMPLES
    EXT OFFSET SIZE NAME [EXT OFFSET SIZE NAME ...]

one line a sample, offsets and sizes in bytes of the member's content. As the format splits at blanks, a tar with
blanks in its names gets version v1.1, which has no names (DALI reads both). Offsets come from `tarfile`, which is
right about GNU and PAX long names.
"""

from __future__ import annotations

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

    def image(self) -> Member | None:
        """The image member, or None."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return self.members[extension]
        return None


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) of a member's path: "a.dir/b.c.jpg" -> ("a.dir/b", "c.jpg")."""
    folder, _, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def index_tar(path: Path) -> list[TarSample]:
    """Samples of a tar in file order. Raises WorkError if the tar is damaged or cut short.

    Directories, links and names that begin with a dot are not samples.
    """
    samples: list[TarSample] = []
    try:
        size_of_file = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                key, extension = split_name(entry.name)
                if not entry.isreg() or not extension or key.rpartition("/")[2] == "":
                    continue
                if entry.offset_data + entry.size > size_of_file:
                    raise WorkError(f"{path}: cut short inside {entry.name}")
                if not samples or samples[-1].key != key or extension in samples[-1].members:
                    samples.append(TarSample(key, {}))
                samples[-1].members[extension] = Member(entry.offset_data, entry.size)
            end_of_members = tar.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise WorkError(f"{path}: not a readable tar ({error})") from None
    if end_of_members + 512 > size_of_file:
        raise WorkError(f"{path}: cut short after {len(samples)} samples (no end-of-archive block)")
    return samples


def index_path(tar: Path) -> Path:
    """The `.idx` file that belongs to a tar."""
    return tar.with_suffix(".idx")


def write_index(tar: Path, samples: list[TarSample]) -> None:
    """Write the `.idx` beside `tar`, atomically."""
    write_atomically(index_path(tar), format_index(samples))


def format_index(samples: list[TarSample]) -> bytes:
    """What the `.idx` of these samples holds."""
    with_names = not any(" " in sample.key for sample in samples)
    lines = [f"{'v1.2' if with_names else 'v1.1'} {len(samples)}"]
    for sample in samples:
        fields = []
        for extension, member in sample.members.items():
            fields += [extension, str(member.offset), str(member.size)]
            if with_names:
                fields.append(f"{sample.key}.{extension}")
        lines.append(" ".join(fields))
    return ("\n".join(lines) + "\n").encode()


def read_index(tar: Path) -> list[TarSample]:
    """Samples according to the `.idx` beside `tar`. Raises WorkError naming the file if it is missing or malformed."""
    path = index_path(tar)
    cure = "write it again with `python -m shards verify --fix-index`"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        version, count = lines[0].split()
        fields_each = {"v1.2": 4, "v1.1": 3}[version]
        samples = []
        for line in lines[1:]:
            fields = line.split(" ")
            if not fields or len(fields) % fields_each:
                raise ValueError(f"line {len(samples) + 2} has {len(fields)} fields")
            members = {
                fields[i]: Member(int(fields[i + 1]), int(fields[i + 2])) for i in range(0, len(fields), fields_each)
            }
            key = split_name(fields[3])[0] if fields_each == 4 else ""
            samples.append(TarSample(key, members))
        if len(samples) != int(count):
            raise ValueError(f"{count} samples announced, {len(samples)} listed")
    except FileNotFoundError:
        raise WorkError(f"{path}: missing; {cure}") from None
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise WorkError(f"{path}: not an index of DALI's format ({error}); {cure}") from None
    return samples
