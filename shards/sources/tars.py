"""Tars that the webdataset library's ShardWriter or img2dataset wrote: KEY.jpg, KEY.txt, KEY.json, KEY.cls."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from dist_train.data.images import SIGNATURE_BYTES, format_by_content
from dist_train.data.tags import tag_line
from dist_train.data.tarindex import IMAGE_EXTENSIONS, Member, TarSample, index_tar
from dist_train.errors import UseError, name_some
from shards.records import FileContent, LeftOut, Record, check_class_names, file_identity
from shards.sources.shared import read_text
from shards.splits import split_in_name

_TAR_NAME = re.compile(r"[^.].*(\.tar(\.\w+)?|\.t[bgx]z2?)", re.IGNORECASE)
_PACKERS = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def read_tars(
    source: Path, class_key: str | None, class_names: Path | None, image_ending: str | None = None
) -> list[Record | LeftOut]:
    """One record per sample, named TAR:KEY; samples without an image or a class are left out.

    The class is the .cls, decimal or a name, or the value of `class_key` in the .json; class_names: a file with the
    names of decimal ids. The tags are the .txt. The split is in the tars' names, or drawn. image_ending: of the image
    where a sample has several.

    Raises UseError if there are no usable samples, one has several images and nothing says which, or only some of the
    names hold a split; WorkError naming a damaged tar.
    """
    names = read_class_names(class_names) if class_names else None
    ending = image_ending.lower().removeprefix(".") if image_ending else None
    tars = tar_files(source)
    splits: Sequence[str | None] = splits_in_names(tars) or [None] * len(tars)
    found: list[Record | LeftOut] = []
    for tar, split in zip(tars, splits, strict=True):
        with open(tar, "rb") as file:
            for sample in (part for whole in index_tar(tar) for part in _taken_apart(whole)):
                found.append(_read_sample(tar, file, sample, split, class_key, names, ending))
    if not any(isinstance(item, Record) for item in found):
        first = found[0] if found else None
        why = f"{first.reason}: {first.detail}" if isinstance(first, LeftOut) else "no samples"
        raise UseError(
            f"{source}: no sample can be used ({why}, in {len(found):,} samples); "
            "the key of its .json is said with --class-key"
        )
    return found


def _read_sample(
    tar: Path,
    file: BinaryIO,
    sample: TarSample,
    split: str | None,
    class_key: str | None,
    names: list[str] | None,
    ending: str | None,
) -> Record | LeftOut:
    name = f"{tar.name}:{sample.key}"
    texts = {}
    for kind in ("json" if class_key else "cls", "txt"):
        if text := sample.find(kind):
            try:
                texts[kind] = read_member(file, text[1]).decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return LeftOut(name, "text is not UTF-8", f"{sample.key}.{text[0]}")
    try:
        class_name = _class_of(texts, class_key, names)
    except ValueError as error:
        return LeftOut(name, "no class", str(error))
    images = _images(file, sample, ending)
    if not images:
        return LeftOut(name, "no image", f"only {', '.join(sample.members)}")
    if len(images) > 1:
        several = ", ".join(f"{sample.key}.{extension}" for extension in images)
        raise UseError(
            f"{tar}: sample {sample.key} has several images ({several}); say the ending of the one to take, "
            f"such as --image-ending {images[0]}"
        )
    member = sample.members[images[0]]
    tags = tag_line(texts["txt"]) if "txt" in texts else None
    return Record(name, FileContent(os.path.abspath(tar), *member), sys.intern(class_name), split, tags)


def image_extensions(sample: TarSample) -> list[str]:
    """Extensions of the members that are images by the last part of it: "jpg", "mask.png"."""
    return [extension for extension in sample.members if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]


def read_member(file: BinaryIO, member: Member) -> bytes:
    """Content of a file inside an open tar. Raises OSError."""
    file.seek(member.offset)
    return file.read(member.size)


def _images(file: BinaryIO, sample: TarSample, ending: str | None) -> list[str]:
    """Extensions of the members that may be the sample's image; where no ending is known, the content says."""
    if ending:
        whole = [extension for extension in sample.members if extension == ending]
        return whole or [extension for extension in sample.members if extension.endswith(f".{ending}")]
    return image_extensions(sample) or [
        extension
        for extension, member in sample.members.items()
        if format_by_content(read_member(file, Member(member.offset, min(member.size, SIGNATURE_BYTES))))
    ]


def _taken_apart(sample: TarSample) -> list[TarSample]:
    """The samples in what was read as one because its key was cut at a dot that is part of the key.

    `a.1.jpg, a.1.cls, a.2.jpg, a.2.cls` is one sample by the convention, but two were meant: if there are several
    images and every extension has a dot, each name up to its last dot is a key.
    """
    if len(image_extensions(sample)) < 2 or not all("." in extension for extension in sample.members):
        return [sample]
    parts: dict[str, dict[str, Member]] = {}
    for extension, member in sample.members.items():
        stem, _, last = extension.rpartition(".")
        parts.setdefault(stem, {})[last] = member
    return [TarSample(f"{sample.key}.{stem}", members) for stem, members in parts.items()]


def tar_files(source: Path) -> list[Path]:
    """The tar `source`, or the tars in that folder, sorted. Raises UseError if there is none, or one is compressed or
    cannot be read."""
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.is_file() and _TAR_NAME.fullmatch(path.name))
    else:
        files = [source]
    for path in files:
        try:
            with open(path, "rb") as file:
                start = file.read(6)
        except OSError as error:
            raise UseError(f"{path}: cannot be read ({error.strerror})") from None
        for magic, tool in _PACKERS.items():
            if start.startswith(magic):
                raise UseError(f"{path}: compressed, but samples are read at any place of a tar; unpack it with {tool}")
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    if not tars:
        raise UseError(f"{source}: no .tar files there")
    known: dict[object, Path] = {}
    for path in tars:
        if (other := known.setdefault(file_identity(str(path)), path)) != path:
            raise UseError(f"{path}: the same file as {other.name}, so its samples would come twice; remove one")
    return tars


def splits_in_names(tars: list[Path]) -> list[str] | None:
    """The split that each tar's name holds; None if none of them holds one. Raises UseError if only some do."""
    named = [split_in_name(tar.name) for tar in tars]
    unknown = [tar.name for tar, split in zip(tars, named, strict=True) if split is None]
    if len(unknown) == len(tars):
        return None
    if unknown:
        known = [tar.name for tar, split in zip(tars, named, strict=True) if split]
        raise UseError(
            f"{tars[0].parent}: the names of some tars do not say their split ({name_some(unknown)}), those of others "
            f"do ({name_some(known)}); rename them (train-..., val-..., test-...) or move them elsewhere"
        )
    return [split for split in named if split]


def read_class_names(file: Path) -> list[str]:
    """Class names by id: the lines of a text file. Raises UseError if one is empty or comes twice."""
    names: dict[str, None] = {}
    for number, line in enumerate(read_text(file).removesuffix("\n").split("\n")):
        name = line.strip()
        if not name or name in names:
            raise UseError(f"{file}, line {number + 1}: empty or there twice; expected the name of class {number}")
        names[name] = None
    check_class_names(names)
    return list(names)


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
