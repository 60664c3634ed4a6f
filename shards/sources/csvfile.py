"""Images listed in a CSV file with a header line: `path,class[,split][,tags]`, other columns ignored."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dist_train.data.tags import tag_line
from dist_train.errors import UseError
from shards.records import FileContent, LeftOut, Record
from shards.sources.shared import each_once, reading_csv
from shards.splits import SPLIT_NAMES, split_named


def read_csv(file: Path, class_column: str = "class", root: Path | None = None) -> list[Record | LeftOut]:
    """One record per line, named by its path as written. Paths start from `root`, or from the CSV's own folder.

    Fields are separated by commas, or by semicolons or tabs where the header's are. Blanks around the names of columns
    and around fields do not count, and backslashes in a path are slashes where only that gives a file. An empty or
    missing split means that one is to be drawn. Lines that repeat an image are left out.

    Raises UseError naming the line that cannot be used, or that contradicts another about its image.
    """
    base = os.path.abspath(root or file.parent)
    records, lines = [], []
    with reading_csv(file), open(file, newline="", encoding="utf-8-sig") as opened:
        header = opened.readline()
        delimiter = next((mark for mark in ",;\t" if mark in header), ",")
        opened.seek(0)
        blanks = f"{delimiter} " in header  # "path, class": then fields begin with a blank too, before quotes even
        table = csv.DictReader(opened, delimiter=delimiter, skipinitialspace=blanks, strict=True)
        table.fieldnames = _columns(file, table.fieldnames or [], class_column)
        for row in table:
            lines.append(table.line_num)
            records.append(_record(row, f"{file}, line {lines[-1]}", class_column, base))
    if not records:
        raise UseError(f"{file}: lists no images")
    if all(record.size() is None for record in records):
        raise UseError(_none_is_there(file, records[0], len(records), base))
    return each_once(records, lambda number: f"{file}, line {lines[number]}")


def _columns(file: Path, header: Sequence[str], class_column: str) -> list[str]:
    """The column names without blanks around them; those that are read as they are called here, in any case."""
    columns = [name.strip() for name in header]
    for known in ("path", class_column, "split", "tags"):
        alike = [i for i, name in enumerate(columns) if name == known]
        alike = alike or [i for i, name in enumerate(columns) if name.lower() == known.lower()]
        if len(alike) > 1:
            raise UseError(f"{file}: the column '{known}' is there {len(alike)} times; leave one")
        if alike:
            columns[alike[0]] = known
        elif known in ("path", class_column):
            raise UseError(
                f"{file}: no column '{known}' in its first line ({', '.join(columns) or 'nothing'}); expected the "
                "header path,class[,split][,tags], or name another class column with --class-column"
            )
    return columns


def _record(row: dict[str | None, str | None], place: str, class_column: str, base: str) -> Record:
    path, class_name = row["path"], (row[class_column] or "").strip()
    if not path or not path.strip() or "\0" in path or not class_name or None in row:
        raise UseError(f"{place}: has an empty path, an empty class, zero bytes, or more fields than the header")
    split = (row.get("split") or "").strip() or None
    if split is not None and split_named(split) is None:
        raise UseError(f"{place}: unknown split '{split}'; known are {', '.join(SPLIT_NAMES)}")
    return Record(
        name=path,
        read=FileContent(_locate(base, path)),
        class_name=class_name,
        split=split and split_named(split),
        tags=tag_line(row["tags"] or "") if "tags" in row else None,
    )


def _locate(base: str, path: str) -> str:
    """The file that a path means: as it is written, without the blanks around it, or with slashes for backslashes; and
    with accents in the other of Unicode's two forms, as names from a Mac have them.

    If none of these exists, the first.
    """
    slashes = path.strip().replace("\\", "/")
    forms = (unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes))
    spellings = dict.fromkeys((path, path.strip(), slashes, *forms))
    places = [os.path.join(base, spelling) for spelling in spellings]
    if len(places) > 1:
        return next((place for place in places if os.path.exists(place)), places[0])
    return places[0]


def _none_is_there(file: Path, record: Record, count: int, base: str) -> str:
    """The message if no image is found at all: a path that was tried, and what is probably wrong with it."""
    path = record.name.strip().replace("\\", "/")
    tried = _locate(base, record.name)
    cure = "name the folder that the paths start from with --root"
    if "://" in path:
        cure = "these are URLs: download the images first, and list their paths"
    elif path[1:3] == ":/" or (path.startswith("/") and "\\" in record.name):
        cure = "these are paths of another machine: write them from a folder on, and name it with --root"
    elif path.startswith("/"):
        cure = "the paths are absolute, so --root does not change them; "
        cure += "write them from a folder on, and name it by --root"
    elif os.path.isfile(os.path.join(os.path.dirname(base), path)):
        cure = f"the paths start a folder higher: --root {os.path.dirname(base)}"
    elif found := _same_but_for_case_or_ending(base, path):
        cure = f"there is {found}: write the paths as the files are called, their case and endings too"
    elif "\\" in record.name:
        cure += "; its backslashes were read as slashes too"
    return f"{file}: none of its {count:,} images is found, {tried} for one; {cure}"


def _same_but_for_case_or_ending(base: str, path: str) -> str | None:
    """A file whose path differs from `path` only in upper and lower case or in its ending; None if there is none."""
    place = base
    for part in os.path.normpath(path).split("/"):
        try:
            names = os.listdir(place)
        except OSError:
            return None
        alike = [name for name in names if name.lower() == part.lower()]
        alike = alike or [name for name in names if os.path.splitext(name)[0].lower() == part.lower()]
        if not alike:
            return None
        place = os.path.join(place, part if part in alike else min(alike))
    return place if os.path.isfile(place) else None
