"""What one host says of itself before a run, as one JSON object; `dist-train doctor` asks every host for it.

python -m dist_train.cluster.probe SHARDS RUN MARKER
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from dist_train.machine import available_memory, versions

PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda120", "timm", "transformers", "numpy")


def existing_folder(path: Path) -> Path:
    """The folder nearest to `path`, upwards, that is there."""
    # os.path, which says no of what it may not look at; pathlib raises.
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if os.path.isdir(folder))


def describe_host(shards: str, run: Path, marker: Path) -> dict[str, Any]:
    """Host, software, devices, memory and disk in bytes, interfaces with an address, time, the shard set's digest.

    marker: a file that lies where the run folder will be; `shared` is whether this host sees it.
    """
    import torch  # slow, and the probe of a host without it must still be able to say so

    devices = (
        [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    folder = existing_folder(run)
    interfaces = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
        if name != "lo" and psutil.net_if_stats()[name].isup
    }
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "code": code_digest(),
        "devices": [{"free": free, "total": total} for free, total in devices],
        "cores": len(os.sched_getaffinity(0)),
        "memory_free": available_memory(),
        "interfaces": {name: addresses for name, addresses in interfaces.items() if addresses},
        "digest": _digest(shards),
        "disk_free": shutil.disk_usage(folder).free,
        "shared": marker.exists(),
        "writable": os.access(folder, os.W_OK),
        "time": time.time(),
    }


def code_digest() -> str:
    """SHA-256 over the project's modules, so that hosts with different code are told apart, committed or not."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(shards: str) -> str:
    """The shard set's digest, or that of the images to build one of, or `error: ` and why it cannot be read."""
    from dist_train.data.manifest import read_manifest
    from dist_train.errors import UseError, WorkError
    from dist_train.image_folder import is_image_source

    if is_image_source(shards):
        return _digest_of_images(Path(shards))
    try:
        return read_manifest(shards).digest
    except (UseError, WorkError) as error:
        return f"error: {error}"


def _digest_of_images(source: Path) -> str:
    """SHA-256 over a CSV file, or over the names and sizes of all files below a folder."""
    digest = hashlib.sha256()
    if source.is_file():
        digest.update(source.read_bytes())
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.is_file():
                digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(describe_host(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
