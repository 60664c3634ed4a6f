"""What a line of tags is: one rule for sidecar files, CSV columns, members of tars and `predict --tags`."""

from __future__ import annotations

import re


def tag_line(text: str) -> str:
    """The tags of a text on one line, separated by single blanks, with "_" for the blanks inside a tag.

    Tags are separated by commas or ends of lines; a text with neither is a line of tags separated by blanks. A tagger's
    backslashes before a bracket, a byte-order mark and blanks around tags are dropped. A line made by this rule is left
    as it is by it.
    """
    text = text.removeprefix("\ufeff").strip()
    if "\\" in text:
        text = re.sub(r"\\+([()])", r"\1", text)
    if "," not in text and "\n" not in text and "\r" not in text:
        return " ".join(text.split())
    tags = ("_".join(tag.split()) for tag in re.split(r"[,\r\n]", text))
    return " ".join(tag for tag in tags if tag)
