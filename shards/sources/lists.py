"""DAF, DAFull, moeImouto and iCartoonFace: lists without a header, `class_id,path`, one per split.

Beside them lie `classid_classname.csv` (`class_id,class_name`, no header) and, for DAF, `train_tags.csv` and so on:
header `id,dir,class_id,tags_cat0,tags_cat3,tags_cat4`, rows in any order, the tags as Python lists. The general tags
(category 0) become the text, joined by blanks as they stand; series and characters (3, 4) would give the class away.
"""

from __future__ import annotations

import ast
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_train.errors import UseError
from shards.records import FileContent, LeftOut, Record
from shards.sources.shared import each_once, reading_csv, tags_in_line
from shards.splits import SPLITS

_IMAGE_FOLDERS = {"daf": "faces", "dafull": "fullMin256", "moeimouto": "data", "icartoonface": "data"}


def read_lists(root: Path, layout: str) -> list[Record | LeftOut]:
    """One record per line of train.csv, val.csv and test.csv (if there are the last two), named by its path.

    layout: daf, dafull, moeimouto or icartoonface. Raises UseError naming the file and line that cannot be used, or if
    none of the images is there.
    """
    lists = root / "labels" if layout in ("daf", "dafull") else root
    images = os.path.abspath(root / _IMAGE_FOLDERS[layout])
    names = _class_names(lists / "classid_classname.csv")
    splits = [split for split in SPLITS if split == "train" or (lists / f"{split}.csv").exists()]
    tag_files = {split: lists / f"{split}_tags.csv" for split in splits}
    with_tags = [split for split in splits if tag_files[split].exists()]
    if with_tags and with_tags != splits:
        missing = next(split for split in splits if split not in with_tags)
        raise UseError(f"{tag_files[missing]}: missing, while {tag_files[with_tags[0]].name} is there; all or none")

    records: list[Record] = []
    for split in splits:
        file = lists / f"{split}.csv"
        tags = _tags(tag_files[split]) if with_tags else None
        first = len(records)
        for place, fields in _rows(file):
            if len(fields) != 2 or fields[0] not in names or "\0" in fields[1]:
                raise UseError(f"{place}: expected class_id,path with an id of {lists / 'classid_classname.csv'}")
            path = fields[1]
            records.append(
                Record(
                    name=path,
                    read=FileContent(os.path.join(images, path)),
                    class_name=names[fields[0]],
                    split=split,
                    tags=None if tags is None else tags.get(path, ""),
                )
            )
        if tags and len(records) > first and not any(record.name in tags for record in records[first:]):
            raise UseError(
                f"{tag_files[split]}: its column dir has none of the paths of {file.name} ({min(tags)} here, "
                f"{records[first].name} there), so no image would have tags"
            )
    if not records:
        raise UseError(f"{lists / 'train.csv'}: lists no images")
    if all(record.size() is None for record in records):
        raise UseError(f"{lists}: none of its {len(records):,} images is found in {images} ({records[0].name} for one)")
    return each_once(records)


def _class_names(file: Path) -> dict[str, str]:
    """Name by id (as written). Raises UseError if two ids share a name: they would become one class."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for place, fields in _rows(file):
        if len(fields) != 2 or fields[0] in names or fields[1] in taken:
            raise UseError(f"{place}: expected class_id,class_name, each id and each name once")
        names[fields[0]] = sys.intern(fields[1])
        taken.add(fields[1])
    return names


def _tags(file: Path) -> dict[str, str]:
    """The line of general tags of each image, by path."""
    rows = _rows(file)
    _, header = next(rows, ("", []))
    if "dir" not in header or "tags_cat0" not in header:
        raise UseError(f"{file}: no columns dir and tags_cat0 in its first line")
    path_at, tags_at = header.index("dir"), header.index("tags_cat0")
    lines = {}
    for place, fields in rows:
        try:
            tags = ast.literal_eval(fields[tags_at])
            if not isinstance(tags, list):
                raise ValueError
            lines[fields[path_at]] = tags_in_line(tags)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, IndexError):
            raise UseError(f"{place}: expected a Python list of strings in the column tags_cat0") from None
    return lines


def _rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and line for messages, fields) of each line of a CSV file."""
    with reading_csv(file), open(file, newline="", encoding="utf-8-sig") as lines:
        table = csv.reader(lines, strict=True)
        for fields in table:
            if fields:
                yield f"{file}, line {table.line_num}", fields
