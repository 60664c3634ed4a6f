"""Two hosts' worth of namespaces on this machine, joined by a cable. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# Network, processes, host name and mounts of its own, all of which end when this process does, however it ends.
_ISOLATE = [
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
]
_START_S = 60.0


def why_no_namespaces(*tools: str) -> str | None:
    """Why there can be no two namespaces here, or none with these programs in them; None where there can."""
    if os.geteuid() != 0:
        return "two network namespaces need root"
    tools = ("ip", "setpriv", "unshare", "nsenter", *tools)
    if missing := [tool for tool in tools if shutil.which(tool, path=PATH) is None]:
        return f"two network namespaces need {', '.join(missing)}: install iproute2, util-linux and what has the others"
    tried = subprocess.run([*_ISOLATE, "true"], capture_output=True)
    return None if tried.returncode == 0 else "namespaces are not allowed here"


@contextmanager
def joined_namespaces(boots: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Start two commands, each as the first process of namespaces of its own, with an end of one cable as its `eth0`.

    Yields their process ids as this machine counts. The interfaces appear after the commands have started, and are
    down. At the end of the block everything in the namespaces is killed. Raises TimeoutError, CalledProcessError.
    """
    started: list[subprocess.Popen[bytes]] = []
    try:
        for boot in boots:
            started.append(subprocess.Popen([*_ISOLATE, *boot], env={**os.environ, "PATH": PATH}))
        pids = [_first_child(outer.pid) for outer in started]
        ends = [f"eth0 netns {pid}" for pid in pids]
        subprocess.run(
            f"ip link add name {ends[0]} type veth peer name {ends[1]}".split(), check=True, env={"PATH": PATH}
        )
        yield pids
    finally:
        for outer in started:
            outer.kill()
            outer.wait()


def inside(pid: int, command: Sequence[str]) -> list[str]:
    """The command to be run in the namespaces of a process, in the present folder."""
    return ["nsenter", "--target", str(pid), "--all", f"--wd={os.getcwd()}", *command]


def _first_child(pid: int) -> int:
    end = time.monotonic() + _START_S
    while not (children := psutil.Process(pid).children()):
        if time.monotonic() > end:
            raise TimeoutError(f"a namespace did not start within {_START_S:g} s")
        time.sleep(0.02)
    return children[0].pid
