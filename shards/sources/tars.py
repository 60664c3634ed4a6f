"""Tars that the webdataset library's ShardWriter or img2dataset wrote: KEY.jpg, KEY.txt, KEY.json, KEY.cls."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_train.data.tarindex import TarSample, index_tar
from dist_train.errors import UseError, WorkError
from shards.records import LeftOut, Record
from shards.sources import SPLIT_NAMES, TarContent
from shards.sources.folders import IMAGE_SUFFIXES

_TAR_NAME = re.compile(r"[^.].*(\.tar(\.\w+)?|\.t[bgx]z2?)", re.IGNORECASE)
_PACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def read_tars(source: Path, class_key: str | None, class_names: Path | None) -> list[Record | LeftOut]:
    """One record per sample, named TAR:KEY; samples without an image or a class are left out.

    The class is the .cls, decimal or a name, or the value of `class_key` in the .json; class_names: a file with the
    names of decimal ids. The tags are the .txt. The split is in the tars' names, or drawn.

    Raises UseError if there are no usable samples, WorkError naming a damaged tar.
    """
    names = read_class_names(class_names) if class_names else None
    tars = tar_files(source)
    splits = [split_in_name(tar.name) for tar in tars]
    if None in splits:
        splits = [None] * len(tars)
    found: list[Record | LeftOut] = []
    for tar, split in zip(tars, splits, strict=True):
        for sample, texts in _samples(tar, ("json",) if class_key else ("cls",)):
            name = f"{tar.name}:{sample.key}"
            images = [member for extension, member in sample.members.items() if f".{extension}" in IMAGE_SUFFIXES]
            try:
                class_name = _class_of(texts, class_key, names)
            except ValueError as error:
                found.append(LeftOut(name, "no class", str(error)))
                continue
            if not images:
                found.append(LeftOut(name, "no image", f"only {', '.join(sample.members)}"))
                continue
            read = TarContent(os.path.abspath(tar), images[0].offset, images[0].size)
            found.append(Record(name, read, sys.intern(class_name), split, texts.get("txt")))
    if not any(isinstance(item, Record) for item in found):
        why = f"{found[0].reason}: {found[0].detail}" if isinstance(next(iter(found), None), LeftOut) else "no samples"
        raise UseError(f"{source}: no sample can be used ({why}); the key of its .json is said with --class-key")
    return found


def tar_files(source: Path) -> list[Path]:
    """The tar `source`, or the tars in that folder, sorted. Raises UseError if there is none or one is compressed."""
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.is_file() and _TAR_NAME.fullmatch(path.name))
    else:
        files = [source]
    for path in files:
        with open(path, "rb") as file:
            start = file.read(6)
        for magic, tool in _PACKERS.items():
            if start.startswith(magic):
                raise UseError(f"{path}: compressed, but samples are read at any place of a tar; unpack it with {tool}")
    tars = [path for path in files if path.suffix == ".tar"]
    if not tars:
        raise UseError(f"{source}: no .tar files there")
    return tars


def split_in_name(name: str) -> str | None:
    """The split that a tar's name holds as one of its parts ("imagenet-train-000000.tar"), None if none or several."""
    parts = {SPLIT_NAMES[part] for part in re.split(r"[^a-z]+", name.lower()) if part in SPLIT_NAMES}
    return parts.pop() if len(parts) == 1 else None


def read_class_names(file: Path) -> list[str]:
    """Class names by id: the lines of a text file. Raises UseError unless they are all there and differ."""
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UseError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    for number, name in enumerate(names):
        if not name or names.index(name) != number:
            raise UseError(f"{file}, line {number + 1}: empty or there twice; expected the name of class {number}")
    return names


def _samples(tar: Path, kinds: tuple[str, ...]) -> Iterator[tuple[TarSample, dict[str, str]]]:
    """The samples of a tar, each with the text of those of its members that say the class and the tags."""
    with open(tar, "rb") as file:
        for sample in index_tar(tar):
            texts = {}
            for extension in (*kinds, "txt"):
                if extension in sample.members:
                    file.seek(sample.members[extension].offset)
                    content = file.read(sample.members[extension].size)
                    try:
                        texts[extension] = content.decode("utf-8-sig").strip()
                    except UnicodeDecodeError:
                        raise WorkError(f"{tar}: {sample.key}.{extension} is not UTF-8 text") from None
            yield sample, texts


def _class_of(texts: dict[str, str], class_key: str | None, names: list[str] | None) -> str:
    """Class name of a sample. Raises ValueError saying what is missing."""
    if class_key is None:
        label = texts.get("cls", "")
        if not label:
            raise ValueError("no .cls")
    else:
        try:
            label = json.loads(texts.get("json", "{}"))[class_key]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"no key {class_key!r} in its .json") from None
        if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
            raise ValueError(f"its {class_key!r} is {label!r}, neither a name nor an id")
    label = str(label).strip()
    if names is None or not (label.isascii() and label.isdigit()):
        return label
    if int(label) >= len(names):
        raise ValueError(f"class {label} has no name: the file of names has {len(names)}")
    return names[int(label)]
