"""Images in one folder per class: ROOT/CLASS/**/image, or ROOT/{train,val,test}/CLASS/**/image with given splits.

The second layout is recognised by the names and the shape of the folders in ROOT: those that hold images are all named
as splits, and their images lie in folders of their own. Where that is in doubt, the source is refused with the names.

The tags of KEY.jpg may lie beside it in KEY.txt, separated by commas or lines as taggers write them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dist_train.data.tags import tag_line
from dist_train.errors import UseError, name_some
from shards.records import FileContent, LeftOut, Record, warn
from shards.sources.listing import Listing, files_below, list_folder, name_endings
from shards.sources.shared import each_once, read_text
from shards.splits import split_in_name, split_named

_SAY = "say --split-folders to read the splits alone, or --no-split-folders where every folder is a class"


def read_folders(
    root: Path, tags: bool | None = None, out: Path | None = None, split_folders: bool | None = None
) -> list[Record | LeftOut]:
    """One record per image file below `root`, named by its path from there, and every file that is none.

    tags: whether to read KEY.txt beside KEY.jpg (an image without one has no tags); None: if there are any. out: a
    folder that is not read, the shard set to be. split_folders: whether the folders named as splits are splits, and
    the others not read, or every folder is a class; None: as their names and shape say.

    Raises UseError if there is no image, the layout is in doubt, there is no KEY.txt where they are asked for, or one
    is no UTF-8 text.
    """
    top = os.path.abspath(root)
    loose = list_folder(top, "", out, everything=split_folders is False)
    listings = {name: list_folder(top, name, out, split_folders is False) for name in loose.folders}
    splits = _find_splits(root, listings, split_folders)
    found: list[tuple[str, str, str | None, str | None]] = []  # path, class, split, .txt
    left_out = [*loose.left_out, *_not_in_a_class(loose.images)]
    empty: set[str] = set()
    for name, listing in listings.items():
        if not splits:
            left_out += listing.left_out
            found += [(path, name, None, text) for path, text in listing.images]
            empty |= set() if listing.images else {name}
        elif name in splits:
            left_out += listing.left_out
            in_class = [(path, text) for path, text in listing.images if path.count("/") > 1]
            found += [(path, path.split("/")[1], splits[name], text) for path, text in in_class]
            left_out += _not_in_a_class([(path, text) for path, text in listing.images if path.count("/") == 1])
            empty.update(f"{name}/{folder}" for folder in set(listing.folders) - listing.folders_with_images())
        elif listing.images or split_folders:
            count = files_below(os.path.join(top, name))
            left_out.append(LeftOut(f"{name}/", "in a folder that is no split", f"{count:,} files, not read", count))
        else:
            left_out += listing.left_out
            empty |= {name} if split_named(name) else set()
    left_out = name_endings(left_out)
    if not found:
        reasons = Counter(entry.reason for entry in left_out)
        there = "; there are: " + ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()) if reasons else ""
        raise UseError(f"{root}: no images found; they must lie in one folder per class, {root}/CLASS/IMAGE.jpg{there}")
    if empty:
        names = name_some(sorted(empty))
        warn(f"{root}: folders that hold no image that is read give no class: {names}")
    return [*each_once(_records(root, top, found, tags)), *left_out]


def _records(
    root: Path, top: str, found: list[tuple[str, str, str | None, str | None]], tags: bool | None
) -> list[Record]:
    some_tags = any(text for *_, text in found)
    if tags and not some_tags:
        raise UseError(f"{root}: no KEY.txt lies beside any KEY.jpg; without tags it is --format folders")
    read_tags = some_tags if tags is None else tags
    return [
        Record(
            name=path,
            read=FileContent(f"{top}/{path}"),
            class_name=class_name,
            split=split,
            tags=(tag_line(read_text(f"{top}/{text}")) if text else "") if read_tags else None,
        )
        for path, class_name, split, text in found
    ]


def _find_splits(root: Path, listings: dict[str, Listing], split_folders: bool | None) -> dict[str, str]:
    """The split that each folder in the root is; empty if the folders are classes. Raises UseError where in doubt."""
    if split_folders is False:
        return {}
    filled = {name: listing for name, listing in listings.items() if listing.images}
    splits = {name: split for name in filled if (split := split_named(name))}
    others = [name for name in filled if name not in splits]
    if not splits and filled:
        parts = {name: split_in_name(name) for name in filled}  # "seg_train", "train2017": weaker, so all or none
        if "train" in parts.values() and None not in parts.values() and not any(f.is_flat() for f in filled.values()):
            splits, others = {name: split for name, split in parts.items() if split}, []
    if not splits:
        if split_folders:
            raise UseError(f"{root}: no folder there is named as a split (train, val, test); leave --split-folders out")
        for name, listing in filled.items():
            within = [folder for folder in sorted(listing.folders_with_images()) if split_named(folder)]
            if len({split_named(folder) for folder in within}) > 1 and not listing.is_flat():
                raise UseError(
                    f"{root / name}: holds folders named as splits ({', '.join(within)}), a level lower than they are "
                    f"read; give {root / name} as SOURCE, or say --no-split-folders where {name} is a class"
                )
        return {}
    if others and split_folders is None:
        # A class that happens to be called "test" holds images as other classes do; a split holds folders of classes.
        one_of_many = len(splits) == 1 and all(filled[name].is_flat() for name in splits)
        if one_of_many and any(filled[name].is_flat() for name in others):
            return {}
        raise UseError(
            f"{root}: beside folders named as splits ({name_some(sorted(splits))}) lie others with images "
            f"({name_some(others)}), so these may be splits or classes; {_SAY}"
        )
    for split in set(splits.values()):
        same = [name for name in splits if splits[name] == split]
        if len(same) > 1:
            raise UseError(f"{root}: {' and '.join(same)} are both the {split} split by their names; rename one")
    for name in splits:
        within = sorted(filled[name].folders_with_images())
        if len(within) == 1 and split_in_name(within[0]) and split_folders is None:
            raise UseError(
                f"{root / name}: holds one folder, {within[0]}, named as a split and no class; move what it holds up "
                f"into {name}, or say --split-folders where it is the one class"
            )
    flat = [name for name in splits if not filled[name].folders_with_images()]
    if flat and split_folders is None:
        raise UseError(
            f"{root}: the images of {' and '.join(flat)} lie in no class folders, so they have no classes; list all "
            "images in a CSV file with the header path,class,split, or say --split-folders to leave those out, or "
            "--no-split-folders where every folder is a class"
        )
    return splits


def _not_in_a_class(images: list[tuple[str, str | None]]) -> list[LeftOut]:
    """Images whose folder says no class, and the .txt beside them."""
    files = [(path, "image outside of the class folders") for path, _ in images]
    files += [(text, "text of an image that is left out") for text in {text for _, text in images if text}]
    return [LeftOut(path, reason, "its folder says no class") for path, reason in sorted(files)]
