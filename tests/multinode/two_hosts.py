"""Two hosts on one machine: namespaces (network, processes, host name, mounts) joined by a cable, an sshd in each."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

TOOLS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "unshare", "nsenter", "mount")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# In a host's namespaces: wait for its end of the cable, then serve ssh. $1 name, $2 address, $3 folder with the keys.
_BOOT = """
hostname "$1" && ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip address add "$2/24" dev eth0 && ip link set eth0 up
mkdir -p /root/.ssh /run/sshd && mount --bind "$3/ssh" /root/.ssh && mount --bind "$3/hosts" /etc/hosts
exec "$(command -v sshd)" -D -e -f "$3/sshd_config" -h "$3/$1.key" 2>>"$3/$1.log"
"""


@dataclass
class Host:
    """One of the two. pid: its first process, the sshd, as this machine counts."""

    name: str
    address: str
    pid: int

    def command(self, *command: str) -> list[str]:
        """`command` to be run on the host, as if at its console."""
        return ["nsenter", "--target", str(self.pid), "--all", f"--wd={os.getcwd()}", *command]

    def run(self, *command: str) -> str:
        return subprocess.run(self.command(*command), check=True, capture_output=True, text=True).stdout

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes of the host, beside ssh's, with `word` in their command."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == space and word in " ".join(process.cmdline()):
                    found.append(process)
            except (OSError, psutil.Error):
                pass  # it has just ended
        return found


def why_not() -> str | None:
    """Why there can be no two hosts here, or None."""
    if os.geteuid() != 0:
        return "two hosts need root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (openssh-server, pdsh, iproute2)"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--uts", "true"], capture_output=True
    )
    return None if tried.returncode == 0 else "namespaces are not allowed here"


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node1 and node2, each reachable by ssh from the other as root. Both end with the block, with all they run."""
    _write_keys(folder)
    started: list[subprocess.Popen[bytes]] = []
    hosts: list[Host] = []
    try:
        for name, address in (("node1", "10.77.0.1"), ("node2", "10.77.0.2")):
            isolate = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            boot = [*isolate, "bash", "-c", _BOOT, "boot", name, address, str(folder)]
            outer = subprocess.Popen(boot, env={**os.environ, "PATH": PATH})
            started.append(outer)
            wait_for(lambda outer=outer: psutil.Process(outer.pid).children(), f"{name} to start")
            hosts.append(Host(name, address, psutil.Process(outer.pid).children()[0].pid))
        ends = [f"eth0 netns {host.pid}" for host in hosts]
        subprocess.run(f"ip link add {ends[0]} type veth peer {ends[1]}".split(), check=True, env={"PATH": PATH})
        for host, other in (hosts, hosts[::-1]):
            check = host.command("ssh", "-o", "BatchMode=yes", other.name, "true")
            wait_for(
                lambda check=check: subprocess.run(check, capture_output=True).returncode == 0,
                f"ssh from {host.name} to {other.name}",
            )
        yield hosts[0], hosts[1]
    finally:
        for outer in started:
            outer.kill()
            outer.wait()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until `condition` holds; fail naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)


def _write_keys(folder: Path) -> None:
    (folder / "ssh").mkdir(mode=0o700)
    keys = {name: folder / f"{name}.key" for name in ("node1", "node2")} | {"user": folder / "ssh" / "id_ed25519"}
    for file in keys.values():
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    (folder / "authorized").write_text(_public(keys["user"]))
    known = [f"{name},10.77.0.{i} {_public(keys[name])}" for i, name in enumerate(("node1", "node2"), 1)]
    (folder / "ssh" / "known_hosts").write_text("".join(known))
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node1\n10.77.0.2 node2\n")
    (folder / "sshd_config").write_text(
        f"AuthorizedKeysFile {folder}/authorized\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
    )


def _public(key: Path) -> str:
    return key.with_suffix(key.suffix + ".pub").read_text()
