"""The run folder belongs to one job at a time, and is written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from dist_train.config import Recipe
from dist_train.errors import UseError, WorkError
from dist_train.place import Place
from dist_train.train.checkpoint import RunState
from dist_train.train.monitor import out_of_patience
from dist_train.train.ranks import from_rank_zero
from dist_train.train.record import SUMMARY_NAME, read_summary

log = logging.getLogger(__name__)

LOCK_NAME = "lock"
_CURES = {
    errno.ENOSPC: "free some space, then --resume auto",
    errno.EDQUOT: "free some of your quota, then --resume auto",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a train.run that can be written"),
}


@contextmanager
def held_run_folder(run: Path, place: Place) -> Iterator[None]:
    """The run folder, for this job alone while the block runs. All ranks call this together.

    Meanwhile the lock file names rank 0's process; it is empty after a block that ended without an error.

    Raises WorkError where another job holds the folder or where it cannot be written, now or later.
    """
    with _named_disk_errors(run), ExitStack() as held:
        torch.distributed.barrier()  # all ranks have looked into it before rank 0 begins to write
        from_rank_zero(lambda: _lock(run, held), place)
        yield


def _lock(run: Path, held: ExitStack) -> None:
    """Lock the folder until `held` ends, or the process. Raises WorkError where that cannot be."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(open(run / LOCK_NAME, "a+", encoding="utf-8"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another job"
        raise WorkError(f"{run} is in use by {holder}; end that one or choose another train.run") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise WorkError(_disk_error(run, error) or f"{run}: cannot be locked ({error})") from None
        log.warning("%s: its file system has no locks, so nothing keeps a second job out (%s)", run, error.strerror)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()

    def leave(error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            file.truncate(0)

    held.push(leave)


@contextmanager
def _named_disk_errors(run: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        line = _disk_error(run, error)
        if line is None:
            raise
        raise WorkError(line) from None


def _disk_error(run: Path, error: Exception) -> str | None:
    """The line for a disk that is full or not to be written; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if "No space left on device" in str(error):  # as safetensors says it
        number = errno.ENOSPC
    where = Path(os.fsdecode(getattr(error, "filename", None) or run))
    if number not in _CURES or not where.is_relative_to(run):
        return None
    return f"{where}: cannot be written ({os.strerror(number)}); {_CURES[number]}"


def nothing_to_do(run: Path, state: RunState, total_steps: int, recipe: Recipe) -> str | None:
    """Why a run that stands there has nothing to do, or None. Raises UseError where that is beyond its end."""
    step, at_end = state.step, state.step >= total_steps
    if (at_end or out_of_patience(state, recipe.train)) and read_summary(run / SUMMARY_NAME).get("steps") == step:
        more = "a higher train.epochs" if at_end else "a higher train.patience, or 0,"
        return (
            f"{run} is complete, step {step} of {total_steps}: nothing to do, nothing changed; its result is in "
            f"{run / SUMMARY_NAME}; {more} trains on"
        )
    if step > total_steps:
        raise UseError(
            f"{run} is at step {step} already, and train.epochs {recipe.train.epochs} ends at step {total_steps}; "
            "set a higher train.epochs, or --resume an earlier checkpoint's folder"
        )
    if 0 < recipe.train.stop_after_steps <= step < total_steps:
        return (
            f"{run} is at step {step} already, and train.stop_after_steps is {recipe.train.stop_after_steps}: "
            "nothing to do, nothing changed; a higher one, or 0, trains on"
        )
    return None
