"""What a shard set says of itself: manifest.json, written last, so a set without one is incomplete.

docs/shards.md has the format. The digest is the SHA-256 of the manifest's canonical JSON without the
digest itself; as the manifest holds each shard's SHA-256, it stands for every byte of the set.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_train.config import DataConfig
from dist_train.data.remote import file_url, is_url, read_file
from dist_train.errors import UseError, WorkError, name_some
from dist_train.files import write_atomically

MANIFEST_NAME = "manifest.json"
BUILD_NAME = "build.json"
LEFT_OUT_NAME = "left_out.jsonl"
MANIFEST_VERSION = 1
_AGAIN = "copy it anew, or delete it and build the set again"


@dataclass(frozen=True)
class ClassInfo:
    """One class; its id is its place in `Manifest.classes`. `count` is over all splits."""

    name: str
    count: int


@dataclass(frozen=True)
class ShardInfo:
    """One tar: file name inside the set, number of samples, size in bytes, SHA-256 of the file in hex."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split, in order; a sample's global index counts through them."""

    samples: int
    shards: tuple[ShardInfo, ...]

    @property
    def shard_samples(self) -> list[int]:
        """Samples of each shard, in order."""
        return [shard.samples for shard in self.shards]


@dataclass(frozen=True)
class Manifest:
    """A complete shard set.

    transform: the fixed transform baked into the images, e.g. "resize 160x160", or None.
    text: whether samples carry tags. left_out: number of input images left out, by reason.
    tool: version of the software that built the set. untrained: ids of the classes without a usable training image;
    they are in the file, and in the digest, only if there are any.
    """

    classes: tuple[ClassInfo, ...]
    splits: dict[str, SplitInfo]
    transform: str | None = None
    text: bool = False
    left_out: dict[str, int] = field(default_factory=dict)
    tool: str = ""
    version: int = MANIFEST_VERSION
    untrained: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over everything the manifest says."""
        canonical = json.dumps(self.document(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """All of it but the digest, as it is written."""
        document = asdict(self)
        if not self.untrained:
            del document["untrained"]
        return document

    def untrained_classes(self) -> str | None:
        """What to say of classes that nothing can be learnt about, None if each has a training image.

        Sets from before `untrained` was written down tell only of classes without any image.
        """
        ids = self.untrained or [i for i, info in enumerate(self.classes) if not info.count]
        if not ids:
            return None
        names = name_some([self.classes[i].name for i in ids])
        return f"{len(ids):,} of {len(self.classes):,} classes have no training image and cannot be learnt: {names}"

    @property
    def class_names(self) -> list[str]:
        """Names in id order."""
        return [info.name for info in self.classes]

    def baked_size(self) -> int | None:
        """Side in pixels of the square that every image was resized to, or None."""
        if self.transform and self.transform.startswith("resize "):
            width, height = self.transform.removeprefix("resize ").split("x")
            return int(width) if width == height else None
        return None

    def resize_note(self, config: DataConfig) -> str | None:
        """A line for a recipe that does not take the images at a size they were made for; None if it does."""
        if config.crop == "random_resized":
            return self._enlarged_note(config.image_size, f"cropped and resized to {config.image_size}")
        square = config.image_size + config.crop_margin
        asked = f"resized again to {square}x{square} (data.image_size {config.image_size} + crop_margin "
        asked += f"{config.crop_margin})"
        if (baked := self.baked_size()) not in (None, square):
            cure = f"`shards build --size {square}` does it once, from the originals"
            return f"its images were resized to {baked}x{baked} and are {asked}; {cure}"
        return self._enlarged_note(square, asked)

    def _enlarged_note(self, needed: int, asked: str) -> str | None:
        """needed: side in pixels up to which an image is not enlarged."""
        longest = re.fullmatch(r"longer side at most (\d+)", self.transform or "")
        side = self.baked_size() or (int(longest[1]) if longest else needed)
        if side < needed:
            return f"its images were shrunk to {side} pixels at most and are {asked}, that is, enlarged"
        return None

    def split(self, name: str) -> SplitInfo:
        """The named split. Raises UseError naming those there are."""
        if name not in self.splits:
            raise UseError(f"the shard set has no split '{name}', only {', '.join(sorted(self.splits))}")
        return self.splits[name]


def check_has_tags(config: DataConfig, manifest: Manifest) -> None:
    """Raise UseError if the shard set has no tags."""
    if not manifest.text:
        key, other = ("data.labels", "class") if config.labels == "tags" else ("model.text_tokens", "0")
        raise UseError(
            f"{key} asks for tags, but the shard set {config.shards} has none; "
            f"build it with tags or set {key} to {other}"
        )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/manifest.json`; do this after every shard of the set is in place."""
    document = manifest.document() | {"digest": manifest.digest}
    write_atomically(root / MANIFEST_NAME, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _cure(folder: Path) -> str:
    """What to do about a folder without a manifest."""
    if (folder / BUILD_NAME).exists():
        return "run the same `python -m shards build` command again to complete it"
    if any(folder.glob("*.tar")):
        return f"`python -m shards adopt {folder}` makes one of its tars"
    return f"if it holds a folder of images for each class, `python -m shards build {folder} OUT` makes one"


def read_manifest(root: str | Path) -> Manifest:
    """Read and check the manifest of a shard set in a folder or at a URL.

    Raises UseError where there is no set or an incomplete one, WorkError where the manifest is damaged.
    """
    remote = is_url(root)
    path = file_url(str(root), MANIFEST_NAME) if remote else str(Path(root) / MANIFEST_NAME)
    if not remote and not Path(root).is_dir():
        raise UseError(f"{root}: no such shard set; build one with `python -m shards build` or `python -m shards demo`")
    try:
        document: dict[str, Any] = json.loads(read_file(path) if remote else Path(path).read_bytes())
    except FileNotFoundError:
        if remote:
            raise UseError(f"{path}: not found, so there is no complete shard set at this URL") from None
        raise UseError(f"{root}: no {MANIFEST_NAME}, so this is no complete shard set; {_cure(Path(root))}") from None
    except OSError as error:
        raise WorkError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise WorkError(f"{path}: cannot be read as JSON ({error}); {_AGAIN}") from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != MANIFEST_VERSION:
        raise UseError(f"{path}: manifest version {version!r}; this software reads version {MANIFEST_VERSION}")
    try:
        manifest = Manifest(
            classes=tuple(ClassInfo(**entry) for entry in document["classes"]),
            splits={
                name: SplitInfo(split["samples"], tuple(ShardInfo(**shard) for shard in split["shards"]))
                for name, split in document["splits"].items()
            },
            transform=document["transform"],
            text=document["text"],
            left_out=document["left_out"],
            tool=document["tool"],
            untrained=tuple(document.get("untrained", ())),
        )
        if document["digest"] != manifest.digest:
            raise WorkError(f"{path}: its digest does not match its content; {_AGAIN}")
    except (KeyError, TypeError, AttributeError) as error:
        raise WorkError(f"{path}: not a manifest ({type(error).__name__}: {error}); {_AGAIN}") from None
    for name, split in manifest.splits.items():
        if split.samples != sum(split.shard_samples):
            raise WorkError(
                f"{path}: split '{name}' counts {split.samples} samples, its shards {sum(split.shard_samples)}"
            )
    return manifest
