"""What several tests do: small shard sets, a small recipe, processes of several ranks, and reading what a run left."""

from __future__ import annotations

import hashlib
import io
import json
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.points import environment_of_one_process
from dist_train.cli import main
from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo, write_manifest
from dist_train.data.tarindex import index_tar, write_index
from dist_train.models.saved import newest_checkpoint, read_weights

REPOSITORY = Path(__file__).parents[1]
CLASSES = 4


# ---------------------------------------------------------------------- shard sets, without the builder
def smooth_image(number: int, width: int, height: int) -> Image.Image:
    """A picture with gradients and a few shapes, different for every number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg_bytes(number: int, width: int = 48, height: int = 40, quality: int = 92) -> bytes:
    """That picture as JPEG."""
    file = io.BytesIO()
    smooth_image(number, width, height).save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_tar(path: Path, samples: Sequence[dict[str, bytes]], first_key: int = 0) -> None:
    """A tar of samples given as {extension: content}."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, members in enumerate(samples):
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{first_key + i:06d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def describe_shard(tar: Path, samples: int) -> ShardInfo:
    """Write the tar's index; returns its entry in the manifest."""
    write_index(tar, index_tar(tar))
    content = tar.read_bytes()
    return ShardInfo(tar.name, samples, len(content), hashlib.sha256(content).hexdigest())


def write_shard_set(
    root: Path,
    splits: dict[str, Sequence[int]],
    size: tuple[int, int] = (48, 40),
    baked: int | None = None,
    text: bool | Callable[[int], str] = False,
    replace: dict[int, bytes] | None = None,
    classes: int = CLASSES,
) -> Path:
    """A set whose splits have shards of the given counts. Sample n has picture n and class n mod `classes`.

    baked: the pictures are squares of that side and the manifest says so. text: whether samples have tags; or from a
    sample's number to its tags. replace: other bytes for some images.
    """
    root.mkdir(parents=True, exist_ok=True)
    size = (baked, baked) if baked else size
    number = 0
    described = {}
    for split, counts in splits.items():
        shards = []
        for k, count in enumerate(counts):
            samples = []
            for n in range(number, number + count):
                members = {"jpg": (replace or {}).get(n, jpeg_bytes(n, *size)), "cls": str(n % classes).encode()}
                if text:
                    tags = text(n) if callable(text) else f"red hair {'cat ears ' * (n % 3)}smile"
                    members["txt"] = tags.encode()
                samples.append(members)
            path = root / f"{split}-{k:06d}.tar"
            write_tar(path, samples, number)
            shards.append(describe_shard(path, count))
            number += count
        described[split] = SplitInfo(sum(counts), tuple(shards))
    infos = tuple(ClassInfo(f"class {i}", len(range(i, number, classes))) for i in range(classes))
    transform = f"resize {baked}x{baked}" if baked else None
    write_manifest(root, Manifest(infos, described, transform, bool(text), tool="tests"))
    return root


def write_raw_set(root: Path, images: list[bytes]) -> Path:
    """A set of one shard that holds the files as they are, past the builder and checked by nobody."""
    root.mkdir()
    tar = root / "train-000000.tar"
    write_tar(tar, [{"jpg": image, "cls": b"0"} for image in images])
    shard = describe_shard(tar, len(images))
    classes = (ClassInfo("all", len(images)),)
    write_manifest(root, Manifest(classes, {"train": SplitInfo(len(images), (shard,))}, tool="tests"))
    return root


def touch(root: Path, *names: str) -> None:
    """Files that differ, with nothing of an image in them but their endings."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


# ---------------------------------------------------------------------- damage
def edit(file: Path, change: Callable[[bytearray], bytearray | bytes | None]) -> None:
    """Write the file as `change` makes it, in place or by what it returns."""
    content = bytearray(file.read_bytes())
    file.write_bytes(change(content) or content)


def flip(file: Path, offset: int | None = None, bit: int = 4) -> None:
    """Turn one bit of a file: of the byte at `offset`, or of the one in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1 << bit
    file.write_bytes(content)


def cut(file: Path, missing: int = 3) -> None:
    """Leave out the last bytes of a file."""
    file.write_bytes(file.read_bytes()[:-missing])


# ---------------------------------------------------------------------- training in small
SMALL: dict[str, object] = {
    "data.image_size": 16,
    "data.crop_margin": 4,
    "data.threads": 1,
    "model.backbone": "vit_tiny_patch8",
    "train.epochs": 2,
    "train.batch_size": 12,
    "train.log_every": 1,
}
"""A recipe whose step takes milliseconds, for sets of pictures of 20 x 20 pixels."""


IFA: dict[str, object] = {
    "data__shuffle_window": 16,
    "model__head": "ifa",
    "optim__lr": 0.01,
    "optim__warmup_steps": 2,
    "train__batch_size": 24,
}
"""Changes to it: an IFA head, at a rate at which it learns in a few steps."""


def arguments(shards: Path, run: Path, **changes: object) -> list[str]:
    """Words of `dist-train train`: the small recipe with changes such as `optim__lr=0.1`, or {"optim.lr": 0.1}."""
    keys = {**SMALL, "data.shards": shards, "train.run": run}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def train(shards: Path, run: Path, resume: str = "none", **changes: object) -> int:
    """Train in this process; returns the exit status."""
    return main(["train", *arguments(shards, run, **changes), f"--resume={resume}"])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged_steps(run: Path) -> list[dict[str, Any]]:
    """Those of training steps."""
    return [entry for entry in read_metrics(run) if "split" not in entry]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Those of evaluations."""
    return [entry for entry in read_metrics(run) if "split" in entry]


def steps_done(run: Path) -> int:
    """The last step that a run has logged; 0 before it has begun. It may be at its next line meanwhile."""
    file = run / "metrics.jsonl"
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    return max((json.loads(line)["step"] for line in whole), default=0)


def read_summary(run: Path) -> dict[str, Any]:
    """What a complete run says of itself."""
    return json.loads((run / "summary.json").read_text())


def newest_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    return read_weights(newest_checkpoint(run))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names and, to the bit, the same values."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_line(said: str) -> str:
    """The one line of what was said that is an error."""
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    return line


# ---------------------------------------------------------------------- processes
def environment(**more: object) -> dict[str, str]:
    """Of a process on the CPU that imports this checkout and knows of no launcher, whatever ran in this one before."""
    small = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": REPOSITORY}
    return environment_of_one_process() | {name: str(value) for name, value in {**small, **more}.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_listening(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], object], what: str = "what must be", seconds: float = 120) -> None:
    """Return as soon as the condition holds; fail naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def launcher(ranks: int, words: Sequence[str]) -> list[str]:
    """The `deepspeed` command that trains on several ranks of this machine."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    ports = ["--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [deepspeed, *ports, str(REPOSITORY / "launch" / "train.py"), *words]


def ranks_under(pid: int) -> list[psutil.Process]:
    """The training processes that the process has started, directly or not."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if child.cmdline()[2:3] == [str(REPOSITORY / "launch" / "train.py")]:
                found.append(child)
    return found
