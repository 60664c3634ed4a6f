"""What several readers do: read text and CSV files, and make sure that each image comes once."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_train.errors import UseError
from shards.records import FileContent, LeftOut, Record


def read_text(file: str | Path) -> str:
    """A file's text, without a byte-order mark. Raises UseError if it cannot be read as UTF-8."""
    try:
        with open(file, encoding="utf-8-sig") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UseError(f"{file}: cannot be read as UTF-8 text ({error})") from None


def tags_in_line(tags: Iterable[object]) -> str:
    """Tags as they stand, joined by blanks, without commas: with one, readers would take it for what separates tags."""
    return " ".join(str(tag).replace(",", "") for tag in tags)


@contextmanager
def reading_csv(file: Path) -> Iterator[None]:
    """Turn a failure to read a CSV file into a UseError that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UseError(f"{file}: cannot be read as a CSV file in UTF-8 ({error})") from None


def each_once(records: Sequence[Record], place_of: Callable[[int], str] | None = None) -> list[Record | LeftOut]:
    """The same with each image file once, whatever it is called (another path, a link); repeats are left out.

    place_of: how messages call the nth record, if not by its name. Raises UseError where one image has two classes,
    splits or lines of tags: one of them is wrong, and an image must not be in two splits.
    """
    first: dict[object, int] = {}
    once: list[Record | LeftOut] = []
    for number, record in enumerate(records):
        identity = record.read.identity() if isinstance(record.read, FileContent) else record
        other = first.setdefault(identity, number)
        if other == number:
            once.append(record)
            continue
        earlier = records[other]
        place, there = (place_of(number), place_of(other)) if place_of else (record.name, earlier.name)
        same = f"{place}: the same image as {there}"
        for what in ("class_name", "split", "tags"):
            mine, its = getattr(record, what), getattr(earlier, what)
            if mine != its:
                called = what.removesuffix("_name")
                raise UseError(f"{same} ({record.name}), its {called} '{mine or 'none'}' here, '{its or 'none'}' there")
        once.append(LeftOut(record.name, "image listed again", same))
    return once
