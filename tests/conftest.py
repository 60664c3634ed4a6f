"""Small real shard sets for the tests, written with tarfile alone, so that the builder is not its own judge."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch is imported: on a busy machine its threads wait for each other far longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.data.manifest import ClassInfo, Manifest, ShardInfo, SplitInfo, write_manifest
from dist_train.data.tarindex import index_tar, write_index

# How long an example takes says something of the machine, not of the code.
hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
CLASSES = 4


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


def write_shard_set(
    root: Path,
    splits: dict[str, Sequence[int]],
    size: tuple[int, int] = (48, 40),
    baked: int | None = None,
    text: bool = False,
    replace: dict[int, bytes] | None = None,
    classes: int = CLASSES,
) -> Path:
    """A set whose splits have shards of the given counts. Sample n has picture n and class n mod `classes`.

    baked: the pictures are squares of that side and the manifest says so. replace: other bytes for some images.
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
                    members["txt"] = f"red hair {'cat ears ' * (n % 3)}smile".encode()
                samples.append(members)
            path = root / f"{split}-{k:06d}.tar"
            write_tar(path, samples, number)
            write_index(path, index_tar(path))
            content = path.read_bytes()
            shards.append(ShardInfo(path.name, count, len(content), hashlib.sha256(content).hexdigest()))
            number += count
        described[split] = SplitInfo(sum(counts), tuple(shards))
    infos = tuple(ClassInfo(f"class {i}", len(range(i, number, classes))) for i in range(classes))
    transform = f"resize {baked}x{baked}" if baked else None
    write_manifest(root, Manifest(infos, described, transform, text, tool="tests"))
    return root


def write_raw_set(root: Path, images: list[bytes]) -> Path:
    """A set of one shard that holds the files as they are, past the builder and checked by nobody."""
    root.mkdir()
    tar = root / "train-000000.tar"
    write_tar(tar, [{"jpg": image, "cls": b"0"} for image in images])
    write_index(tar, index_tar(tar))
    content = tar.read_bytes()
    shard = ShardInfo(tar.name, len(images), len(content), hashlib.sha256(content).hexdigest())
    classes = (ClassInfo("all", len(images)),)
    write_manifest(root, Manifest(classes, {"train": SplitInfo(len(images), (shard,))}, tool="tests"))
    return root


@pytest.fixture(autouse=True)
def torchs_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 puts another function in its place, for the whole process: put back after each test."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size such as 4m, once; a test is skipped where it may not."""
    folder = tmp_path / "small"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            folder.rmdir()
            pytest.skip("mounting a file system is not allowed here")
        return folder

    yield mount
    if folder.exists():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def shard_set(tmp_path: Path) -> Callable[..., Path]:
    """Calls `write_shard_set` in the test's own folder."""
    return lambda splits, name="set", **options: write_shard_set(tmp_path / name, splits, **options)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images; a test that needs it is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} with real images is not here")
    return SHARED_DATA
