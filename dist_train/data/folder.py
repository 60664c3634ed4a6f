"""Images that lie in a folder, and the tags that lie beside them."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.data.images import SIGNATURE_BYTES, format_by_content
from dist_train.data.tags import tag_line
from dist_train.data.tarindex import IMAGE_EXTENSIONS
from dist_train.errors import UseError

_IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
# Raw files of cameras are TIFFs by their first bytes, and what a reader of TIFF finds in them is a thumbnail.
_RAW_SUFFIXES = frozenset(".3fr .arw .cr2 .dng .erf .kdc .mef .mos .nef .nrw .orf .pef .rw2 .sr2 .srf .srw".split())
_TAG_SUFFIXES = (".txt", ".TXT", ".tags")


def is_image_file(path: str | Path) -> bool:
    """Whether a file is taken for an image: by its ending; one with another ending, or none, by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _IMAGE_SUFFIXES:
        return True
    if suffix in _RAW_SUFFIXES or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as opened:
            return format_by_content(opened.read(SIGNATURE_BYTES)) is not None
    except OSError:
        return False


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and in the folders below it, sorted folder by folder; hidden ones are left out.

    Symbolic links are followed, but not in circles. Raises UseError for a folder that cannot be listed.
    """
    found: list[Path] = []

    def fail(error: OSError) -> None:
        raise UseError(f"{error.filename}: cannot be listed ({error.strerror})") from None

    for place, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        below = Path(place).relative_to(folder)
        way = [os.path.realpath(folder / part) for part in (below, *below.parents)]
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _leads_back(os.path.join(place, name), way)
        )
        for name in sorted(files):
            if not name.startswith(".") and is_image_file(os.path.join(place, name)):
                found.append(Path(place, name))
    return found


def tags_beside(image: Path) -> str | None:
    """The line of tags in photo.txt, or photo.tags, beside photo.jpg, "" for an empty file; None where there is none.

    Raises OSError for a file that cannot be read.
    """
    for suffix in _TAG_SUFFIXES:
        file = image.with_suffix(suffix)
        if file.is_file() and file != image:
            return tag_line(file.read_text(encoding="utf-8", errors="replace"))
    return None


def _leads_back(folder: str, way: list[str]) -> bool:
    """Whether a folder holds one of those on the way to it."""
    real = os.path.realpath(folder)
    return any(here == real or here.startswith(real.rstrip(os.sep) + os.sep) for here in way)
