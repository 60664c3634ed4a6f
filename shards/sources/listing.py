"""What lies below a folder: its images, the .txt of each, and every file that is neither, with the reason.

Symbolic links are followed, but not in circles. Everything is taken in sorted order. A file is an image by its ending
or by its first bytes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_train.data.folder import is_image_file
from dist_train.errors import UseError
from shards.records import LeftOut, file_identity

_NEVER_CLASSES = {"__macosx", "annotation", "annotations"}  # in lower case
_NO_FORMAT = "no known image format"
_ENDINGS_NAMED = 20


@dataclass
class Listing:
    """What lies below the root of a source, or below one of the folders in it, by paths from the root.

    images: (path, path of the .txt beside it or None) of each. folders: names of its subfolders that are read.
    left_out: the files that are no images, and what is in folders that are not read.
    """

    images: list[tuple[str, str | None]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def is_flat(self) -> bool:
        """Whether images lie in the folder of the root itself, not only in its subfolders."""
        return any(path.count("/") == 1 for path, _ in self.images)

    def folders_with_images(self) -> set[str]:
        """Names of the subfolders that images lie below."""
        return {path.split("/", 2)[1] for path, _ in self.images if path.count("/") > 1}


def list_folder(root: str, name: str = "", out: Path | None = None, everything: bool = False) -> Listing:
    """What lies below the folder `name` in `root`; of the root itself ("") the files and the names of folders.

    out: a folder that is skipped. everything: also read folders whose names say that they hold no class.
    """
    listing = Listing()
    unread = file_identity(str(out)) if out is not None else None

    def visit(place: str, above: list[object]) -> None:
        """Add what lies in one folder, then what lies in its subfolders; above: the folders that it lies in."""
        identity = file_identity(os.path.join(root, place))
        if identity in above:  # a link to a folder that it lies in
            return
        try:
            with os.scandir(os.path.join(root, place)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise UseError(f"{os.path.join(root, place)}: cannot be listed ({error.strerror})") from None
        prefix = f"{place}/" if place else ""
        folders = [entry for entry in found if entry.is_dir()]
        _sort_files([entry for entry in found if not entry.is_dir()], prefix, listing)
        for folder in folders:
            if unread is not None and file_identity(folder.path) == unread:
                continue
            if why := _why_unread(folder, everything):
                if count := files_below(folder.path):
                    files = f"{count:,} files, not read"
                    listing.left_out.append(LeftOut(f"{prefix}{folder.name}/", why, files, count))
                continue
            if place == name:
                listing.folders.append(folder.name)
            if name:
                visit(prefix + folder.name, [*above, identity])

    visit(name, [file_identity(root)] if name else [])
    return listing


def is_shard_set(folder: str) -> bool:
    """Whether a folder holds a shard set, complete or not: tars with a manifest or a build.json."""
    if not any(os.path.exists(os.path.join(folder, name)) for name in ("build.json", "manifest.json")):
        return False
    return any(name.endswith((".tar", ".idx", ".lock")) for name in os.listdir(folder))


def files_below(folder: str) -> int:
    """Number of files below a folder, links not followed."""
    return sum(len(files) for _, _, files in os.walk(folder))


def name_endings(left_out: list[LeftOut]) -> list[LeftOut]:
    """The same with the ending in the reason of each file of no known format; beyond 20, rare endings share one."""
    endings = Counter(_ending(entry.name) for entry in left_out if entry.reason == _NO_FORMAT)
    named = {ending for ending, _ in endings.most_common(_ENDINGS_NAMED)}

    def with_ending(entry: LeftOut) -> LeftOut:
        ending = _ending(entry.name)
        return replace(entry, reason=f"{_NO_FORMAT} ({ending if ending in named else 'other endings'})")

    return [with_ending(entry) if entry.reason == _NO_FORMAT else entry for entry in left_out]


def _sort_files(files: list[os.DirEntry[str]], prefix: str, listing: Listing) -> None:
    """Sort the files of one folder into images, their sidecars and the rest."""
    texts: dict[str, str] = {}
    images: list[str] = []
    others: list[str] = []
    for file in files:
        if file.name.startswith("."):
            listing.left_out.append(LeftOut(prefix + file.name, "hidden file", "its name begins with a dot"))
            continue
        stem, suffix = os.path.splitext(file.name)
        if suffix.lower() == ".txt" and (suffix == ".txt" or stem not in texts):
            texts[stem] = file.name
        (images if is_image_file(file.path) else others).append(file.name)
    sidecars = set()
    for name in images:
        text = texts.get(os.path.splitext(name)[0])
        listing.images.append((prefix + name, None if text is None else prefix + text))
        sidecars.add(text)
    for name in others:
        why = (_NO_FORMAT, f"neither its ending nor its content ({_ending(name)})")
        if name.lower().endswith(".txt"):
            why = ("text without an image", "no image has its name")
        if name not in sidecars:
            listing.left_out.append(LeftOut(prefix + name, *why))


def _why_unread(folder: os.DirEntry[str], everything: bool) -> str | None:
    """The reason to leave a folder unread, None if it is read."""
    if folder.name.startswith("."):
        return "in a hidden folder"
    if not everything and folder.name.lower() in _NEVER_CLASSES:
        return f"in a folder named {folder.name.lower()}"
    return "in a shard set" if is_shard_set(folder.path) else None


def _ending(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if not suffix:
        return "no ending"
    return suffix if re.fullmatch(r"\.[a-z0-9_+~-]{1,11}", suffix) else "other endings"
