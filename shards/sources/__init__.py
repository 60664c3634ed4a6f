"""Readers of what lies on a user's disk, one per layout; each gives the builder a list of records.

A reader that leaves images out itself adds `LeftOut` entries to its list.
"""

from __future__ import annotations

from pathlib import Path

from dist_train.errors import UseError
from shards.records import LeftOut, Record
from shards.sources.csvfile import read_csv
from shards.sources.danbooru import read_danbooru
from shards.sources.folders import read_folders
from shards.sources.listing import is_shard_set
from shards.sources.lists import read_lists
from shards.sources.tars import read_tars

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


def read_source(
    source: Path,
    layout: str | None = None,
    class_column: str | None = None,
    root: Path | None = None,
    class_key: str | None = None,
    class_names: Path | None = None,
    out: Path | None = None,
    split_folders: bool | None = None,
    image_ending: str | None = None,
) -> list[Record | LeftOut]:
    """Records of a source, each image once, and what its reader left out.

    layout: one of LAYOUTS; None finds it out. class_column (csv): the column that holds the class. root (csv): the
    folder that its paths start from, its own if None; (danbooru): the folder of buckets of images. class_key
    (webdataset): the key of a sample's .json that holds its class, instead of its .cls. class_names (webdataset): a
    file with the names of the decimal ids, one a line. out: a folder inside the source that is not read, the shard set
    to be. split_folders (folders, sidecar): whether folders named as splits are splits (True) or classes (False); None:
    found out. image_ending (webdataset): the ending of the image to take where a sample has several.

    Raises UseError if there is no such source, it has no records, an option does not belong to its layout, or one image
    has two classes, splits or lines of tags.
    """
    if not source.exists():
        raise UseError(f"{source}: no such folder or file")
    if out is not None and out.exists() and out.samefile(source):
        raise UseError(f"{out}: the shard set would lie among its own source; choose another folder for it")
    found_out = layout is None
    layout = layout or find_layout(source, out)
    if layout not in ("csv", "danbooru", "webdataset") and not source.is_dir():
        raise UseError(f"{source}: --format {layout} needs a folder")
    if layout == "csv" and source.is_dir():
        raise UseError(f"{source}: --format csv needs a file")
    for option, value, layouts in (
        ("--class-column", class_column, ("csv",)),
        ("--root", root, ("csv", "danbooru")),
        ("--class-key", class_key, ("webdataset",)),
        ("--classes", class_names, ("webdataset",)),
        ("--image-ending", image_ending, ("webdataset",)),
        ("--split-folders", split_folders, ("folders", "sidecar")),
    ):
        if value is not None and layout not in layouts:
            raise UseError(f"{option} belongs to sources of --format {' or '.join(layouts)}; {source} is {layout}")

    match layout:
        case "csv":
            return read_csv(source, class_column or "class", root)
        case "danbooru":
            return read_danbooru(source, root)
        case "webdataset":
            return read_tars(source, class_key, class_names, image_ending)
        case "folders" | "sidecar":
            return read_folders(source, None if found_out else layout == "sidecar", out, split_folders)
        case _:
            return read_lists(source, layout)


def find_layout(source: Path, out: Path | None = None) -> str:
    """The layout of a source, as far as it can be told: "folders" stands for "sidecar" too; `out` is no part of it.

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
    if any(source.glob("*.tar")):
        folders = [entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
        own = out if out is not None and out.exists() else None
        if all((own and folder.samefile(own)) or is_shard_set(str(folder)) for folder in folders):
            return "webdataset"
    return "folders"
