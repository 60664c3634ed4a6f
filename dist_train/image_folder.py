"""Images where a shard set is expected, `data.shards: my_images/`: a set is built of them, once, before training.

The builder (`shards/`) stands above this package: it is asked as a process, `python -m shards cache`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from dist_train.config import DataConfig, Recipe
from dist_train.data.cache import default_folder
from dist_train.data.manifest import BUILD_NAME, MANIFEST_NAME
from dist_train.data.remote import is_url
from dist_train.errors import ToldAlready

_PR_SET_PDEATHSIG = 1


def is_image_source(shards: str) -> bool:
    """Whether data.shards names images to build a set of: a CSV file, or a folder with folders in it.

    Not a set, complete or not, nor tars without a manifest: what they lack is said where they are read.
    """
    if is_url(shards):
        return False
    path = Path(shards)
    if path.suffix.lower() == ".csv":
        return path.is_file()
    try:
        with os.scandir(path) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return False
    if any(name in (MANIFEST_NAME, BUILD_NAME) or name.endswith(".tar") for name, _ in found):
        return False
    return any(is_folder and not name.startswith(".") for name, is_folder in found)


def sets_folder(config: DataConfig) -> Path:
    """Where sets of images are built: `sets` in data.cache, or beside the shards of remote sets."""
    return (Path(config.cache) if config.cache else default_folder().parent) / "sets"


def size_options(config: DataConfig) -> list[str]:
    """The builder's options for the size at which the recipe takes images."""
    if config.crop == config.eval_crop == "squash":
        return ["--size", str(config.image_size + config.crop_margin)]
    # With the aspect kept. A crop of a random size takes half of the area on average: at twice image_size most crops
    # still have more pixels than they are resized to, and images load several times faster than at a camera's size.
    return ["--max-side", str(2 * config.image_size)]


def with_shard_set(recipe: Recipe) -> Recipe:
    """The recipe with a shard set for data.shards: its own, or one of the images that it names.

    That is built where it is not there yet, or not of these very images; several processes of a host may ask at once.
    Raises ToldAlready where there are no images to build it of, or where the building fails.
    """
    if not is_image_source(recipe.data.shards):
        return recipe
    words = ["-m", "shards", "cache", recipe.data.shards, str(sets_folder(recipe.data)), *size_options(recipe.data)]
    # -P: a folder `shards` where the user stands is not the builder. What is beside this package is, installed or not.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-P", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_end_with_parent,
    )
    *lines, folder = done.stdout.splitlines() or [""]
    for line in lines:
        print(line, file=sys.stderr)
    if done.returncode:
        status = done.returncode if done.returncode > 0 else 128 - done.returncode
        raise ToldAlready(f"no shard set could be built of {recipe.data.shards}", status)
    return replace(recipe, data=replace(recipe.data, shards=folder))


def _end_with_parent() -> None:
    """Runs in the process that is about to be the builder: who kills the ranks must not leave builders behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
