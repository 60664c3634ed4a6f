"""Danbooru20xx: posts as JSON, one a line, in either schema, and images in buckets, `BUCKET/ID.EXT`.

Up to 2020 a post has `tags`: a list of {id, name, category}, category 0 general, 4 character; later it has
`tag_string_general`, `tag_string_character`, names separated by blanks, as the site's API gives it. A post with exactly
one character tag is a sample of that class; its general tags, in their order, are the text. BUCKET is ID modulo 1000 in
four digits; `original/` keeps each post's own file type, `512px/` has JPEGs.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_train.errors import UseError
from shards.records import FileContent, LeftOut, Record
from shards.sources.shared import tags_in_line


def read_danbooru(metadata: Path, images: Path | None) -> list[Record | LeftOut]:
    """One record per post with one character tag and an image below `images`; the others are counted by reason.

    metadata: a file, or a folder all of whose files are such. It is streamed: memory grows with the records kept only.

    Raises UseError naming the file and line that is no post, or if no post can be used.
    """
    if images is None or not images.is_dir():
        raise UseError(f"--root must name the folder of the images, such as danbooru2020/512px, not {images}")
    tree = os.path.abspath(images)
    records: dict[int, Record] = {}
    left_out: Counter[str] = Counter()
    for place, post in _posts(metadata):
        if post.get("id") is None:  # a banned post
            left_out["post without an id"] += 1
            continue
        try:
            number = int(post["id"])
            characters, general = _tags(post, "character", "4"), _tags(post, "general", "0")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UseError(f"{place}: not a Danbooru post with an id and tags in one of the two schemas") from None
        if len(characters) != 1:
            left_out["several character tags" if characters else "no character tag"] += 1
        elif number in records:
            left_out["post listed twice"] += 1
        elif (path := _image(tree, number, post.get("file_ext"))) is None:
            left_out["missing file"] += 1
        else:
            records[number] = Record(
                name=os.path.relpath(path, tree),
                read=FileContent(path),
                class_name=sys.intern(characters[0]),
                tags=tags_in_line(general),
            )
    if not records:
        found = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "it is empty"
        raise UseError(f"{metadata}: no post has one character tag and an image below {images} ({found})")
    entries = [LeftOut(str(metadata), reason, f"{count:,} posts", count) for reason, count in sorted(left_out.items())]
    return [*records.values(), *entries]


def _posts(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line for messages, post) of each line."""
    if metadata.is_dir():
        files = sorted(path for path in metadata.iterdir() if path.is_file() and not path.name.startswith("."))
    else:
        files = [metadata]
    for file in files:
        try:
            with open(file, "rb") as lines:
                if lines.read(1) == b"[":
                    raise UseError(f"{file}: one JSON array; make it a post a line with `jq -c '.[]'`")
                lines.seek(0)
                for number, line in enumerate(lines, start=1):
                    post = json.loads(line) if line.strip() else {}
                    if not isinstance(post, dict):
                        raise ValueError("no object")
                    if post:
                        yield f"{file}, line {number}", post
        except OSError as error:
            raise UseError(f"{file}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise UseError(f"{file}, line {number}: not a post in JSON ({error})") from None


def _tags(post: dict[str, Any], kind: str, category: str) -> list[str]:
    """Names of a post's tags of one kind, each once (old metadata lists some twice)."""
    if f"tag_string_{kind}" in post:
        names = post[f"tag_string_{kind}"].split()
    else:
        names = [tag["name"] for tag in post["tags"] if str(tag["category"]) == category]
    return list(dict.fromkeys(names))


def _image(tree: str, number: int, extension: object) -> str | None:
    """Path of a post's image: its own file type, or the JPEG that trees of shrunk images have."""
    for suffix in dict.fromkeys((extension, "jpg")):
        path = os.path.join(tree, f"{number % 1000:04d}", f"{number}.{suffix}")
        if str(suffix).isalnum() and os.path.isfile(path):
            return path
    return None
