"""Readers of what lies on a user's disk, one per layout; each gives the builder a list of records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import UseError
from shards.records import Record

# What sources call a split, in lower case, and what a shard set calls it.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


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


def read_source(
    source: Path, layout: str | None = None, class_column: str = "class", root: Path | None = None
) -> list[Record]:
    """Records of a source: a folder of class folders, or a CSV file.

    layout: "folders" or "csv"; None finds it out. class_column: the CSV column that holds the class. root: the folder
    that the CSV's paths start from, its own if None.

    Raises UseError if there is no such source or it has no records.
    """
    from shards.sources.csvfile import read_csv
    from shards.sources.folders import read_folders

    if not source.exists():
        raise UseError(f"{source}: no such folder or CSV file")
    if layout is None:
        layout = "folders" if source.is_dir() else "csv" if source.suffix.lower() == ".csv" else None
    if layout is None:
        raise UseError(f"{source}: neither a folder nor a .csv file; say what it is with --format")
    if (layout == "folders") != source.is_dir():
        raise UseError(f"{source}: --format {layout} needs a {'folder' if layout == 'folders' else 'file'}")
    if layout == "csv":
        return read_csv(source, class_column, root)
    if root is not None or class_column != "class":
        raise UseError("--root and --class-column belong to CSV sources")
    return read_folders(source)
