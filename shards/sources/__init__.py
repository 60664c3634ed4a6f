"""Readers of what lies on a user's disk, one per layout; each gives the builder a list of records.

A reader that leaves images out itself adds `LeftOut` entries to its list.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UseError
from shards.records import LeftOut, Record

# What sources call a split, in lower case, and what a shard set calls it.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

LAYOUTS = {
    "folders": "ROOT/CLASS/*.jpg or ROOT/{train,val,test}/CLASS/*.jpg",
    "sidecar": "the same, with the tags of KEY.jpg in KEY.txt beside it",
    "csv": "a CSV file with the header path,class[,split][,tags]",
    "daf": "the face crops of DAF: ROOT/faces and the lists in ROOT/labels",
    "dafull": "the whole images of DAFull: ROOT/fullMin256 and the lists in ROOT/labels",
    "moeimouto": "ROOT/data, ROOT/train.csv, ROOT/test.csv, ROOT/classid_classname.csv",
    "icartoonface": "the same as moeimouto",
    "danbooru": "Danbooru metadata, a post a line: a file or a folder of them; --root names the images, .../512px",
    "webdataset": "tars of the webdataset library or of img2dataset: a folder of them or one",
}
"""The layouts that `read_source` knows, and how each lies on a disk."""


@dataclass(frozen=True)
class FileContent:
    """A record's `read` for a file on disk."""

    path: str

    def __call__(self) -> bytes:
        """The file's bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            return file.read()

    def size(self) -> int | None:
        """Bytes, or None if the file cannot be found."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return None


@dataclass(frozen=True)
class TarContent:
    """A record's `read` for a file inside a tar: `length` bytes from `offset` on."""

    path: str
    offset: int
    length: int

    def __call__(self) -> bytes:
        """The file's bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def size(self) -> int:
        """Bytes."""
        return self.length


def read_source(
    source: Path,
    layout: str | None = None,
    class_column: str | None = None,
    root: Path | None = None,
    class_key: str | None = None,
    class_names: Path | None = None,
) -> list[Record | LeftOut]:
    """Records of a source, and what its reader left out.

    layout: one of LAYOUTS; None finds it out. class_column (csv): the column that holds the class. root (csv): the
    folder that its paths start from, its own if None; (danbooru): the folder of buckets of images. class_key
    (webdataset): the key of a sample's .json that holds its class, instead of its .cls. class_names (webdataset): a
    file with the names of the decimal ids, one a line.

    Raises UseError if there is no such source, it has no records, or an option does not belong to its layout.
    """
    from shards.sources.csvfile import read_csv
    from shards.sources.danbooru import read_danbooru
    from shards.sources.folders import read_folders
    from shards.sources.lists import read_lists
    from shards.sources.tars import read_tars

    if not source.exists():
        raise UseError(f"{source}: no such folder or file")
    found_out = layout is None
    layout = layout or find_layout(source)
    if layout in ("folders", "sidecar", "daf", "dafull", "moeimouto", "icartoonface") and not source.is_dir():
        raise UseError(f"{source}: --format {layout} needs a folder")
    if layout == "csv" and source.is_dir():
        raise UseError(f"{source}: --format csv needs a file")
    for option, value, layouts in (
        ("--class-column", class_column, ("csv",)),
        ("--root", root, ("csv", "danbooru")),
        ("--class-key", class_key, ("webdataset",)),
        ("--classes", class_names, ("webdataset",)),
    ):
        if value is not None and layout not in layouts:
            raise UseError(f"{option} belongs to sources of --format {' or '.join(layouts)}; {source} is {layout}")

    match layout:
        case "csv":
            return [*read_csv(source, class_column or "class", root)]
        case "danbooru":
            return read_danbooru(source, root)
        case "webdataset":
            return read_tars(source, class_key, class_names)
        case "folders" | "sidecar":
            return [*read_folders(source, tags=None if found_out else layout == "sidecar")]
        case _:
            return [*read_lists(source, layout)]


def find_layout(source: Path) -> str:
    """The layout of a source, as far as it can be told: "folders" stands for "sidecar" too.

    Raises UseError if it can be more than one or is none that is known.
    """
    if not source.is_dir():
        known = {".csv": "csv", ".json": "danbooru", ".jsonl": "danbooru", ".tar": "webdataset"}
        if source.suffix.lower() not in known:
            raise UseError(f"{source}: neither a folder nor a {', '.join(known)} file; say what it is with --format")
        return known[source.suffix.lower()]
    if (source / "labels/classid_classname.csv").is_file():
        both = {"faces": "daf", "fullMin256": "dafull"}
        there = [layout for folder, layout in both.items() if (source / folder).is_dir()]
        if len(there) != 1:
            raise UseError(
                f"{source}: has {'both' if there else 'neither'} of {' and '.join(both)}; say --format daf "
                "for the face crops or --format dafull for the whole images"
            )
        return there[0]
    if (source / "classid_classname.csv").is_file() and (source / "train.csv").is_file():
        return "icartoonface"
    if any(source.glob("*.tar")) and not any(entry.is_dir() for entry in source.iterdir()):
        return "webdataset"
    return "folders"


def check_any_found(records: list[Record], place: Path | str, cure: str) -> None:
    """Raises UseError if the images of none of the records are there: then the source is not where it should be."""
    if not any(record.read.size() is not None for record in records):
        raise UseError(f"{place}: none of its {len(records):,} images is found {cure}")
