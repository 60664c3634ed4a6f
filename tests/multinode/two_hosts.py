"""Two hosts on one machine: namespaces (network, processes, host name, mounts) joined by a cable, an sshd in each."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.speed.link import inside, joined_namespaces, why_no_namespaces
from tests.harness import wait_for

TOOLS = ("sshd", "ssh", "ssh-keygen", "pdsh", "mount")

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
        return inside(self.pid, command)

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
    return why_no_namespaces(*TOOLS)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node1 and node2, each reachable by ssh from the other as root. Both end with the block, with all they run."""
    _write_keys(folder)
    addresses = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
    boots = [["bash", "-c", _BOOT, "boot", *host, str(folder)] for host in addresses.items()]
    with joined_namespaces(boots) as pids:
        first, second = (Host(*host, pid) for host, pid in zip(addresses.items(), pids, strict=True))
        for host, other in ((first, second), (second, first)):
            check = host.command("ssh", "-o", "BatchMode=yes", other.name, "true")
            wait_for(
                lambda check=check: subprocess.run(check, capture_output=True).returncode == 0,
                f"ssh from {host.name} to {other.name}",
            )
        yield first, second


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
