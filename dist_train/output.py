"""Standard output is for what a command was asked for, and for nothing else.

Libraries print where they like, C code among them, on import too: so a command points file descriptor 1 at standard
error before it does anything, and writes its result through `say`, to where 1 was.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from dist_train.errors import print_to

_kept: TextIO | None = None


def keep_stdout() -> None:
    """From here on standard output has only what `say` writes: in this process, and in those that it starts nothing."""
    global _kept
    if sys.stdout is None or sys.stderr is None:  # >&-
        for number in (1, 2):
            if not _is_open(number):  # the next file that is opened would be what C code prints to
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return
    if _kept is not None:
        return
    print_to(sys.stdout)
    encoding = sys.stdout.encoding
    # A file's name need not be text, and a class need not be writable in the terminal's encoding.
    errors = "surrogateescape" if encoding.lower() == "utf-8" else "backslashreplace"
    _kept = open(os.dup(1), "w", encoding=encoding, errors=errors)
    os.dup2(2, 1)
    sys.stdout = sys.stderr


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def say(*lines: object) -> None:
    """Write lines to standard output, at once.

    Raises OutputClosed where nobody reads it any more (`| head -1`), WorkError where it cannot be written.
    """
    print_to(_kept or sys.stdout, *lines)
