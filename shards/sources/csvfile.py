"""Images listed in a CSV file with a header line: `path,class[,split][,tags]`, other columns ignored."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from dist_train.errors import UseError
from shards.records import Record
from shards.sources import SPLIT_NAMES, FileContent, check_any_found


def read_csv(file: Path, class_column: str = "class", root: Path | None = None) -> list[Record]:
    """One record per line, named by its path as written. Paths start from `root`, or from the CSV's own folder.

    An empty or missing split means that one is to be drawn. Raises UseError naming the line that cannot be used.
    """
    base = os.path.abspath(root or file.parent)
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            table = csv.DictReader(lines, strict=True)
            _check_header(file, table.fieldnames or (), class_column)
            records = [_record(row, f"{file}, line {table.line_num}", class_column, base) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UseError(f"{file}: cannot be read as a CSV file in UTF-8 ({error})") from None
    if not records:
        raise UseError(f"{file}: lists no images")
    check_any_found(records, file, f"under {base}; name their folder, --root")
    return records


def _check_header(file: Path, columns: list[str] | tuple[str, ...], class_column: str) -> None:
    missing = [column for column in ("path", class_column) if column not in columns]
    if missing:
        found = ", ".join(columns) or "nothing"
        raise UseError(
            f"{file}: no column '{missing[0]}' in its first line ({found}); expected the header "
            "path,class[,split][,tags], or name another class column with --class-column"
        )


def _record(row: dict[str | None, str | None], place: str, class_column: str, base: str) -> Record:
    path, class_name = row["path"], row[class_column]
    if not path or not class_name or None in row:
        raise UseError(f"{place}: has an empty path, an empty class, or more fields than the header")
    split = (row.get("split") or "").strip().lower() or None
    if split is not None and split not in SPLIT_NAMES:
        raise UseError(f"{place}: unknown split '{split}'; known are {', '.join(SPLIT_NAMES)}")
    return Record(
        name=path,
        read=FileContent(os.path.join(base, path)),
        class_name=class_name.strip(),
        split=split and SPLIT_NAMES[split],
        tags=(row["tags"] or "") if "tags" in row else None,
    )
