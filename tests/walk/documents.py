"""README.md and docs/ as text, their links, and the committed results that they quote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.harness import REPOSITORY

_PAGES = (
    "finetuning",
    "shards",
    "training",
    "models",
    "python",
    "nodes",
    "checkpoints",
    "export",
    "tags",
    "paper",
    "benchmarks",
    "architecture",
    "extending",
)
DOCUMENTS = ("README.md", *(f"docs/{page}.md" for page in _PAGES), "CONTRIBUTING.md")
"""In the order in which they are walked through."""


def text_of(document: str) -> str:
    """A document's Markdown."""
    return (REPOSITORY / document).read_text(encoding="utf-8")


def result(name: str) -> dict[str, Any]:
    """A committed result of the benchmarks."""
    return json.loads((REPOSITORY / "benchmarks" / "results" / f"{name}.json").read_text())


def text_in_one_line(document: str) -> str:
    """A document without its line breaks."""
    return " ".join(text_of(document).split())


def broken_links() -> list[str]:
    """Links of the documents to files or headings that are not there."""
    broken = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text_of(document)):
            path, _, heading = target.partition("#")
            file = (REPOSITORY / document).parent / path if path else REPOSITORY / document
            if not file.exists() or (heading and heading not in headings(file)):
                broken.append(f"{document}: {target}")
    return broken


def headings(file: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
