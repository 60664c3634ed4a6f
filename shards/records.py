"""What a source hands to the builder: one record per image, and what the source itself leaves out."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dist_train.errors import UseError, name_some

HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, surrogates, line and paragraph separators, by Unicode's category."""
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class FileContent:
    """A record's `read` for a file on disk, or for one inside a tar: `length` bytes from `offset` on."""

    path: str
    offset: int = 0
    length: int | None = None

    def __call__(self) -> bytes:
        """The file's bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            if self.length is None:
                return file.read()
            file.seek(self.offset)
            return file.read(self.length)

    def size(self) -> int | None:
        """Bytes, or None if the file cannot be found."""
        if self.length is not None:
            return self.length
        try:
            return os.stat(self.path).st_size
        except OSError:
            return None

    def identity(self) -> object:
        """Equal for two paths of one file on disk, links included."""
        return file_identity(self.path) or os.path.normpath(self.path)


def file_identity(path: str) -> tuple[int, int] | None:
    """What tells a file or folder from all others, under any name; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Record:
    """One image on its way into a shard set.

    name: what reports call it (a path). read: returns the encoded image's bytes; it must be picklable, as it runs in
    a worker process. class_name: its class. split: the split that its source gives it, or None to have one drawn.
    tags: its tags on one line, or None if the source has no text.
    """

    name: str
    read: FileContent | Callable[[], bytes]
    class_name: str
    split: str | None = None
    tags: str | None = None

    def size(self) -> int | None:
        """Bytes of the encoded image; None where the file is not there, or only reading it would tell."""
        return self.read.size() if isinstance(self.read, FileContent) else None


@dataclass(frozen=True)
class LeftOut:
    """An input file that is not in the set, with a short reason; or `count` of them under one name."""

    name: str
    reason: str
    detail: str
    count: int = 1


def check_class_names(names: Iterable[str]) -> None:
    """Raises UseError for a name that would harm what prints or stores it; warns of names that look nearly alike.

    Harmful are line breaks and other control characters, marks that change the direction of text, and surrogates, which
    names in other encodings than UTF-8 become. All other characters, of any script, are allowed.
    """
    alike: dict[str, str] = {}
    twins = []
    for name in names:
        if any(c in _TURNING or unicodedata.category(c) in HARMFUL for c in name):
            raise UseError(f"class name {name!r} holds control characters or is no UTF-8 text; rename it")
        seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        seen = " ".join(seen.casefold().split())
        if not seen:
            raise UseError(f"class name {name!r} is empty; rename it")
        if (other := alike.setdefault(seen, name)) != name:
            twins.append(f"{other!a} and {name!a}")
    if twins:
        warn(f"classes whose names look alike are classes of their own: {name_some(twins)}")


def warn(line: str) -> None:
    """Print on stderr what a user would want to know before training, though it is no error."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
