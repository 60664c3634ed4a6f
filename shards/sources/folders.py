"""Images in one folder per class: ROOT/CLASS/**/image, or ROOT/{train,val,test}/CLASS/**/image with given splits.

The second layout is recognised by ROOT holding nothing but folders named as splits. Everything is taken in sorted
order, symbolic links are followed, hidden files and files without an image's extension are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dist_train.errors import UseError
from shards.records import Record
from shards.sources import SPLIT_NAMES, FileContent

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)


def read_folders(root: Path) -> list[Record]:
    """One record per image file below `root`, named by its path from there. Raises UseError if there is none."""
    folders = _class_folders(root)
    given_splits = bool(folders) and all(folder.name.lower() in SPLIT_NAMES for folder in folders)
    records = []
    for folder in folders:
        split = SPLIT_NAMES[folder.name.lower()] if given_splits else None
        for class_folder in _class_folders(folder) if given_splits else [folder]:
            records += [
                Record(
                    name=os.path.relpath(path, root),
                    read=FileContent(path),
                    class_name=class_folder.name,
                    split=split,
                )
                for path in _image_files(class_folder)
            ]
    if not records:
        raise UseError(f"{root}: no images found; they must lie in one folder per class, {root}/CLASS/IMAGE.jpg")
    return records


def _class_folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UseError(f"{root}: cannot be listed ({error.strerror})") from None


def _image_files(folder: Path) -> Iterator[str]:
    """Absolute paths of the image files below `folder`, each real folder entered once (links may form circles)."""
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
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                yield os.path.join(place, name)
