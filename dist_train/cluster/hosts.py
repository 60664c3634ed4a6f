"""The hostfile of the deepspeed launcher: a line `NAME slots=N` for each host."""

from __future__ import annotations

import re
from pathlib import Path

from dist_train.errors import UseError

# Nothing that a shell, or ssh's command line, could take for anything but a name.
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([1-9][0-9]*)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of each host, in the file's order. Raises UseError naming the line that is not `NAME slots=N`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UseError(f"hostfile {path}: cannot be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise UseError(
                f"{path}, line {number}: {line!r} is not of the form `NAME slots=N`, such as `node1 slots=8`"
            )
        if match[1] in hosts:
            raise UseError(f"{path}, line {number}: {match[1]} is there twice; give it one line with all its slots")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UseError(f"hostfile {path}: no hosts in it; write a line `NAME slots=N` for each")
    return hosts
