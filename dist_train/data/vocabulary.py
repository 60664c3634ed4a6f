"""The file of a WordPiece vocabulary, one token a line. Imports nothing slow: a wrong file is told at once."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.errors import UseError

WHOLE_TAGS = "tags"
"""The value of data.tokenizer for one token a tag."""


def read_vocabulary(name_or_file: str) -> dict[str, int] | None:
    """The tokens of a vocabulary file with their ids; None for what is no file but a tokenizer on the hub.

    Raises UseError for a path that is no file, and for a file that is no vocabulary.
    """
    path = Path(name_or_file)
    if os.path.isfile(path):
        try:
            tokens = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UseError(f"data.tokenizer {path}: cannot be read as text ({error})") from None
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in tokens]
        if missing:
            raise UseError(f"{path}: not a WordPiece vocabulary, it lacks {', '.join(missing)}")
        return {token: i for i, token in enumerate(tokens)}
    if name_or_file.endswith(".txt") or (os.sep in name_or_file and path.parent.exists()):
        raise UseError(f"data.tokenizer {name_or_file}: no such file")
    return None
