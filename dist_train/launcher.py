"""The deepspeed launcher above this process, which it must not outlive.

On one node `deepspeed` (the runner) starts `deepspeed.launcher.launch`, which starts the ranks. SIGTERM ends the runner
alone: it passes nothing on, and the process between it and the ranks would go on with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")


@dataclass(frozen=True)
class Launcher:
    """The process that started this one, and the runner that started that; None where it was started otherwise."""

    node: psutil.Process
    runner: int | None

    def is_gone(self) -> bool:
        """Whether one of the two has ended. By the parents' numbers: who is dead may still be waited for."""
        try:
            return psutil.Process().ppid() != self.node.pid or self.runner not in (None, self.node.ppid())
        except psutil.Error:
            return True


_noted: list[Launcher] = []


def note_launcher() -> None:
    """Note who started this process, where that is the deepspeed launcher. To be called first of all: later the runner
    may be gone already, and nothing would tell.
    """
    try:
        node = psutil.Process().parent()
        if node is None or "deepspeed.launcher.launch" not in node.cmdline():
            return
        runner = node.parent()
        if runner is not None and not any(Path(word).name in _RUNNERS for word in runner.cmdline()[:4]):
            runner = None
    except psutil.Error:
        return
    _noted.append(Launcher(node, runner.pid if runner is not None else None))


def noted_launcher() -> Launcher | None:
    """What `note_launcher` has found."""
    return _noted[-1] if _noted else None
