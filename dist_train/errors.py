"""The two ways a command fails: wrong use (exit 2) and failed work (exit 1).

Both carry one clear line for the user, which names the file, key, rank or host and the cure; the command-line
entry points print that line without a traceback. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence


class UseError(Exception):
    """The user asked for something that cannot be done as asked: exit status 2."""


class WorkError(Exception):
    """The work itself failed (a damaged file, an unreachable host): exit status 1."""


def name_some(names: Sequence[str], most: int = 5) -> str:
    """The first few names for a message: "a, b, c and 4 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def run_command(command: Callable[[], int | None]) -> int:
    """Run `command`; turn the two errors into one line on stderr. Returns the process's exit status."""
    try:
        return command() or 0
    except (UseError, WorkError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if (
            rank
        ):  # the launcher ends all ranks when the first exits: let rank 0 speak first where it has the same to say
            time.sleep(3)
        where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UseError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
