"""Keep a training job alive: start it again from its newest checkpoint when it fails.

python launch/supervise.py [--restarts N] [--backoff S] -- deepspeed launch/train.py --config RECIPE [...]
python launch/supervise.py -- launch/multinode.sh HOSTFILE --config RECIPE [...]

Everything after the launcher's own arguments, from the first of the recipe on (--config, --section.key, --resume), is
the recipe's. Gives up after N restarts without a newer checkpoint, and at once where the command was used wrongly
(exit status 2). SIGTERM and SIGINT make the job save and end.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from dist_train.errors import Parser, UseError, run_command
from dist_train.parse import parse_recipe
from dist_train.recipe import check_run_folder

_OF_THE_RECIPE = re.compile(r"--(config|resume|[a-z]+\.[a-z_]+)(=.*)?")
_LONGEST_WAIT = 600.0  # seconds between two starts


def main(arguments: list[str]) -> int:
    """Run the command until it ends well, was used wrongly, was asked to stop, or makes no progress."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=3, help="restarts without a newer checkpoint (default: 3)")
    parser.add_argument("--backoff", type=float, default=10.0, help="seconds before the first, then doubled (10)")
    parser.add_argument("command", nargs="+", help="after `--`: the launcher with its arguments, then the recipe's")
    options = parser.parse_args(arguments)
    first = next((i for i, word in enumerate(options.command) if _OF_THE_RECIPE.fullmatch(word)), len(options.command))
    launcher, words = options.command[:first], options.command[first:]
    recipe, resume = parse_recipe(words)
    run = Path(recipe.train.run)
    check_run_folder(run, resume)

    stop = Stop(run)
    failures, step = 0, newest_step(run)
    while not stop.asked.is_set():
        say(f"start: {' '.join([*launcher, *words])}")
        before = lock_state(run)
        status = stop.run([*launcher, *words])
        if status == 0 and not stop.asked.is_set() and not is_complete(run, recipe.train.stop_after_steps, before):
            status = 1  # the deepspeed launcher ends with 0 where a signal killed what it started
        if status == 0 or stop.asked.is_set():
            say(f"ended with status {status} after step {max(newest_step(run), 0)}")
            return status
        if status == 2:
            say("wrong use, see above: not started again")
            return 2
        newest = newest_step(run)
        failures = 1 if newest > step else failures + 1
        step = newest
        if failures > options.restarts:
            say(f"failed with status {status}; {failures} failures and no checkpoint newer than step {step}: giving up")
            return 1
        wait = min(_LONGEST_WAIT, options.backoff * 2.0 ** min(failures - 1, 100))
        where = f"newest checkpoint: step {step}" if step >= 0 else "no checkpoint yet"
        say(f"failed with status {status}; {where}; again in {wait:g} s")
        stop.asked.wait(wait)
        words = resumed(words, run)
    return 1


def resumed(words: list[str], run: Path) -> list[str]:
    """The recipe's arguments, made to continue the run if it has begun."""
    begun = (run / "metrics.jsonl").exists() or newest_step(run) >= 0
    return [*words, "--resume", "auto"] if begun else words


def newest_step(run: Path) -> int:
    """The step of the newest complete checkpoint, -1 where there is none."""
    steps = [folder.parent.name.removeprefix("step-") for folder in run.glob("checkpoints/step-*/state.json")]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def is_complete(run: Path, stop_after_steps: int, before: tuple[int, int]) -> bool:
    """Whether the job came to the run's end, or to the step where the recipe stops it.

    What a run has left there that is trained further says nothing of the job that was to do so: its rank 0 has written
    its name into the lock file, which was as `before`, and emptied that as it ended.
    """
    changed, size = lock_state(run)
    ended = changed != before[0] and size == 0
    return ended and ((run / "summary.json").exists() or 0 < stop_after_steps <= newest_step(run))


def lock_state(run: Path) -> tuple[int, int]:
    """When the lock file was last changed, in nanoseconds, and its bytes; (0, 0) where there is none."""
    try:
        with open(run / "lock", "rb") as file:  # to open it asks a network file system how it is now
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervise: {text}", file=sys.stderr, flush=True)


class Stop:
    """Runs the command, and passes SIGTERM and SIGINT on to rank 0, which makes all ranks save and end.

    The launcher is asked only where rank 0 is not on this host or has not begun: it would leave the ranks behind, or
    give them 30 seconds.
    """

    def __init__(self, run: Path) -> None:
        self.asked = threading.Event()
        self._run_folder = run
        self._child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def run(self, command: list[str]) -> int:
        """The exit status of `command`; 128 + N where signal N killed it."""
        try:
            # A session of its own, so that Ctrl-C comes to the ranks through here alone.
            self._child = subprocess.Popen(command, start_new_session=True)
        except OSError as error:
            raise UseError(f"{command[0]}: cannot be started ({error.strerror})") from None
        if self.asked.is_set():  # meanwhile: there was no child yet to tell
            self._child.send_signal(signal.SIGTERM)
        status = self._child.wait()
        return status if status >= 0 else 128 - status

    def _pass_on(self, number: int, frame: object) -> None:
        self.asked.set()
        if self._child is None or self._child.poll() is not None:
            return
        process = lock_holder(self._run_folder)
        say(f"asked to stop: telling {f'rank 0, process {process}' if process else 'the launcher'}")
        if process:
            subprocess.run(["kill", "-TERM", str(process)])
        else:
            self._child.send_signal(signal.SIGTERM)


def lock_holder(run: Path) -> int | None:
    """The process on this host that holds the run folder, rank 0's; None where it is elsewhere or there is none."""
    try:
        with open(run / "lock", encoding="utf-8") as file:
            words = file.read().split()  # process NUMBER on HOST
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(words[1]) if len(words) == 4 and words[3] == socket.gethostname() else None
    except OSError:
        pass
    return None


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
