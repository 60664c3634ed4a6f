"""What a source hands to the builder: one record per image, and what it leaves out itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One image on its way into a shard set.

    name: what reports call it (a path). read: returns the encoded image's bytes; it must be picklable, as it runs in
    a worker process. class_name: its class. split: the split that its source gives it, or None to have one drawn.
    tags: its tags on one line, or None if the source has no text.
    """

    name: str
    read: Callable[[], bytes]
    class_name: str
    split: str | None = None
    tags: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """An input image that is not in the set, with a short reason; or `count` of them that are not told apart."""

    name: str
    reason: str
    detail: str
    count: int = 1
