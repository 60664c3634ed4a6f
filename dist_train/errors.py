"""The two ways a command fails: wrong use (exit 2) and failed work (exit 1).

Both carry one clear line for the user, which names the file, key, rank or host and the cure; the command-line
entry points print that line without a traceback. Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

CLOSED_PIPE = 128 + 13
"""Exit status of a command whose output nobody reads any more, as of one that SIGPIPE ended."""


class UseError(Exception):
    """The user asked for something that cannot be done as asked: exit status 2."""


class WorkError(Exception):
    """The work itself failed (a damaged file, an unreachable host): exit status 1."""


class Parser(argparse.ArgumentParser):
    """argparse's, for which a wrong word is wrong use like any other: one line, not its list of all options."""

    def error(self, message: str) -> NoReturn:
        """Raise UseError."""
        # What none of the commands takes is noticed by the parser above them.
        of_a_command = message.startswith("unrecognized arguments") and self._subparsers is not None
        raise UseError(f"{message}; {self.prog}{' COMMAND' if of_a_command else ''} --help says what there is")


class ToldAlready(Exception):
    """A process that this one started has failed, and has said why: this one ends with its exit status."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}; the line above says why")
        self.status = status


def name_some(names: Sequence[str], most: int = 5) -> str:
    """The first few names for a message: "a, b, c and 4 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


class OutputClosed(Exception):
    """Nobody reads standard output any more (`| head -1`): the command ends without a word."""


@contextlib.contextmanager
def written(path: Path, cure: str) -> Iterator[None]:
    """Make an OSError from within a WorkError that names the file that cannot be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror}); {cure}") from None


def print_to(stream: TextIO | None, *lines: object) -> None:
    """Write lines, and what is still in the stream's buffer, now: at the interpreter's exit nobody could answer.

    Raises OutputClosed where nobody reads the stream any more, WorkError where it cannot be written.
    """
    if stream is None:  # >&-
        return
    try:
        stream.writelines(f"{line}\n" for line in lines)
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # the exit would try again to write what is in the buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise OutputClosed from None
        raise WorkError(f"standard output cannot be written ({error.strerror})") from None


def run_command(command: Callable[[], int | None]) -> int:
    """Run `command`; turn the two errors into one line on stderr. Returns the process's exit status."""
    try:
        try:
            status = command() or 0
        except SystemExit:  # of argparse, after --help
            print_to(sys.stdout)
            raise
        print_to(sys.stdout)
        return status
    except OutputClosed:
        return CLOSED_PIPE
    except ToldAlready as failure:
        return failure.status
    except (UseError, WorkError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # The launcher ends all ranks when the first exits: let rank 0 speak first where it has the same to say.
            time.sleep(3)
        where = f" (rank {rank} on {socket.gethostname()})" if rank else ""
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UseError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
