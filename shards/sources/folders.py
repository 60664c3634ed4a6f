"""Images in one folder per class: ROOT/CLASS/**/image, or ROOT/{train,val,test}/CLASS/**/image with given splits.

The second layout is recognised by ROOT holding nothing but folders named as splits. Everything is taken in sorted
order, symbolic links are followed, hidden files and files without an image's extension are ignored.

The tags of KEY.jpg may lie beside it in KEY.txt, separated by commas or lines as taggers write them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from dist_train.errors import UseError
from shards.records import Record
from shards.sources import SPLIT_NAMES, FileContent

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)


def read_folders(root: Path, tags: bool | None = None) -> list[Record]:
    """One record per image file below `root`, named by its path from there.

    tags: whether to read KEY.txt beside KEY.jpg (an image without one has no tags); None: if there are any.

    Raises UseError if there is no image, no KEY.txt where they are asked for, or one is no UTF-8 text.
    """
    folders = _class_folders(root)
    given_splits = bool(folders) and all(folder.name.lower() in SPLIT_NAMES for folder in folders)
    found: list[tuple[str, str, str | None, str | None]] = []
    for folder in folders:
        split = SPLIT_NAMES[folder.name.lower()] if given_splits else None
        for class_folder in _class_folders(folder) if given_splits else [folder]:
            found += [(path, class_folder.name, split, text) for path, text in _image_files(class_folder)]
    if not found:
        raise UseError(f"{root}: no images found; they must lie in one folder per class, {root}/CLASS/IMAGE.jpg")
    some_tags = any(text for *_, text in found)
    if tags and not some_tags:
        raise UseError(f"{root}: no KEY.txt lies beside any KEY.jpg; without tags it is --format folders")
    read_tags = some_tags if tags is None else tags
    return [
        Record(
            name=os.path.relpath(path, root),
            read=FileContent(path),
            class_name=class_name,
            split=split,
            tags=(tag_line(text) if text else "") if read_tags else None,
        )
        for path, class_name, split, text in found
    ]


def tag_line(file: str) -> str:
    """The tags of a text file on one line, separated by blanks, with "_" for the blanks inside a tag.

    Tags are separated by commas or ends of lines; a file with neither holds such a line already. A tagger's backslash
    before a bracket is dropped. Raises UseError if the file cannot be read as UTF-8 text.
    """
    try:
        with open(file, encoding="utf-8-sig") as opened:
            text = re.sub(r"\\([()])", r"\1", opened.read().strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UseError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if "," not in text and "\n" not in text:
        return " ".join(text.split())
    tags = ("_".join(tag.split()) for tag in re.split(r"[,\n]", text))
    return " ".join(tag for tag in tags if tag)


def _class_folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UseError(f"{root}: cannot be listed ({error.strerror})") from None


def _image_files(folder: Path) -> Iterator[tuple[str, str | None]]:
    """Absolute paths of the image files below `folder`, and of the .txt beside each where there is one.

    Each real folder is entered once (links may form circles).
    """
    entered = set()

    def refuse(error: OSError) -> None:
        raise UseError(f"{error.filename}: cannot be listed ({error.strerror})")

    for place, subfolders, files in os.walk(os.path.abspath(folder), followlinks=True, onerror=refuse):
        identity = os.stat(place)
        if (identity.st_dev, identity.st_ino) in entered:
            subfolders.clear()
            continue
        entered.add((identity.st_dev, identity.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        texts = {name for name in files if name.endswith(".txt")}
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if not name.startswith(".") and suffix.lower() in IMAGE_SUFFIXES:
                text = os.path.join(place, f"{stem}.txt") if f"{stem}.txt" in texts else None
                yield os.path.join(place, name), text
