"""The command `python -m shards`: build, cache, adopt, verify, info, demo."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from dist_train.data.manifest import read_manifest
from dist_train.data.remote import is_url
from dist_train.errors import Parser, UseError, run_command
from dist_train.output import keep_stdout, say
from shards.adopt import UNDECODABLE, adopt_tars
from shards.build import build_shard_set
from shards.cached import cached_shard_set
from shards.demo.records import demo_records
from shards.info import describe, summarise
from shards.plan import BuildOptions
from shards.sources import LAYOUTS, read_source
from shards.splits import SPLITS
from shards.verify import fix_indexes, verify_shard_set

_DETECTION = """

Without --format: a .csv file is csv, a .json or .jsonl file danbooru, a .tar file or a folder of nothing but tars
webdataset; DAF and DAFull are known by their lists if only one of their image folders is there, moeimouto and
icartoonface by theirs; any other folder is folders, or sidecar if any KEY.txt lies beside a KEY.jpg. Where a file's
ending does not say whether it is an image, its content does. Every file that is not taken is counted by reason and
listed in left_out.jsonl; OUT, shard sets, hidden folders, __MACOSX and annotations are not read.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 (the work failed, the set is damaged) or 2 (wrong use)."""

    def command() -> int:
        parsed = _parser().parse_args(arguments)  # --help goes to standard output: before that is kept for results
        if arguments is None:
            keep_stdout()
        return parsed.command(parsed)

    return run_command(command)


def _build(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    records = read_source(
        arguments.source,
        arguments.format,
        class_column=arguments.class_column,
        root=arguments.root,
        class_key=arguments.class_key,
        class_names=arguments.classes,
        out=arguments.out,
        split_folders=arguments.split_folders,
        image_ending=arguments.image_ending,
    )
    say(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    say(cached_shard_set(arguments.source, arguments.cache, _options(arguments)))
    return 0


def _adopt(arguments: argparse.Namespace) -> int:
    manifest = adopt_tars(
        arguments.folder,
        classes=arguments.classes,
        split=arguments.split,
        ratios=arguments.ratios,
        seed=arguments.seed,
        decode=not arguments.no_decode,
        workers=arguments.workers,
    )
    say(describe(arguments.folder, manifest))
    if manifest.left_out:
        say(
            f"  training will set the {manifest.left_out[UNDECODABLE]:,} undecodable images aside "
            "(data.max_bad_samples must allow for as many)"
        )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    records = demo_records(arguments.characters, arguments.pictures, arguments.size, arguments.seed)
    say(describe(arguments.out, build_shard_set(records, arguments.out, options)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if is_url(arguments.set):
        raise UseError(f"{arguments.set}: verify reads folders; copy the set to one first (training checks each shard)")
    root = Path(arguments.set)
    if arguments.fix_index:
        for path in fix_indexes(root):
            say(f"{path}: written again")
    differences = verify_shard_set(root, arguments.workers)
    if differences:
        say("\n".join(differences))
        return 1
    facts = summarise(read_manifest(root))
    shards = sum(split["shards"] for split in facts["splits"].values())
    counts = f"{shards:,} shards, {facts['samples']:,} samples, {facts['classes']:,} classes"
    say(f"{arguments.set}: {counts}, all as the manifest says")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    manifest = read_manifest(arguments.set)
    say(json.dumps(summarise(manifest), indent=1) if arguments.json else describe(arguments.set, manifest))
    return 0


def _options(arguments: argparse.Namespace) -> BuildOptions:
    """The options that a command has; the others keep their defaults."""
    names = {field.name for field in fields(BuildOptions)}
    return BuildOptions(**{name: value for name, value in vars(arguments).items() if name in names})


def _ratios(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UseError(f"--ratios must be three numbers such as 0.7,0.1,0.2, not '{text}'") from None
    return train, val, test


def _workers(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


# ---- the arguments ---------------------------------------------------------------------------------------------------

_DEFAULTS = BuildOptions(workers=len(os.sched_getaffinity(0)))
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "--root": (
        "DIR",
        Path,
        "csv: where the paths start from (default: the CSV's folder); danbooru: the folder of image buckets",
    ),
    "--class-column": ("NAME", str, "csv: the column that holds the class (default: class)"),
    "--class-key": ("KEY", str, "webdataset: the class is KEY in a sample's .json (default: its .cls)"),
    "--image-ending": (
        "ENDING",
        str,
        "webdataset: the image to take of samples that have several, such as jpg beside mask.png",
    ),
    "--size": ("S", int, "squash images to S x S pixels (default: keep their size)"),
    "--max-side": ("N", int, "shrink images so that the longer side has at most N pixels (default: keep their size)"),
    "--min-per-class": (
        "N",
        int,
        "leave out classes with fewer than N images; the paper has 20 (default: %(default)s)",
    ),
    "--quality": ("Q", int, "JPEG quality of images that are encoded again, 1 to 100, 4:2:0 (default: %(default)s)"),
    "--classes": ("FILE", Path, "tars with decimal classes: their names by id, one a line (default: the ids)"),
    "--shard-mb": (
        "MB",
        float,
        "largest shard in millions of bytes; small splits get smaller shards, so that there is work for several "
        "processes (default: %(default)s)",
    ),
    "--seed": ("N", int, "seed of the splits, the order and drawn pictures (default: %(default)s)"),
    "--workers": (
        "N",
        _workers,
        "worker processes (default: the cores of this machine, %(default)s), or ray: the Ray cluster that RAY_ADDRESS "
        "names, whose nodes must all have the project and the folders at the same paths",
    ),
}
"""Options with a value: its name in the help, how it is read, what it does."""


def _add_options(command: argparse.ArgumentParser, *flags: str) -> None:
    """Add options of the table above; the default is that of BuildOptions, where it has such a field."""
    for flag in flags:
        metavar, kind, text = _OPTIONS[flag]
        default = getattr(_DEFAULTS, flag.removeprefix("--").replace("-", "_"), None)
        command.add_argument(flag, metavar=metavar, type=kind, default=default, help=text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m shards", description="Make, check and describe shard sets: WebDataset tars with a manifest."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (_add_build, _add_cache, _add_adopt, _add_demo, _add_verify, _add_info):
        add_command(commands)
    return parser


def _add_build(commands: Any) -> None:
    build = commands.add_parser(
        "build",
        help="build a shard set from images, or complete one",
        description="Build the shard set OUT from the images of SOURCE. Every image is decoded once, made an upright "
        "RGB JPEG (what is one already is kept byte for byte), and left out, with the reason in left_out.jsonl, if "
        "that fails. The same command again completes an interrupted build.",
        epilog="NAME of --format:\n" + "\n".join(f"  {name:<14}{lies}" for name, lies in LAYOUTS.items()) + _DETECTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = build.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder or file that holds or lists the images; see --format")
    add("out", type=Path, metavar="OUT", help="folder of the shard set")
    add("--format", choices=list(LAYOUTS), metavar="NAME", help="what SOURCE is, see below (default: found out)")
    _add_options(build, "--root", "--class-column", "--class-key", "--image-ending")
    add(
        "--split-folders",
        action=argparse.BooleanOptionalAction,
        help="folders: those named as splits (train, val, test) are splits and the others not read, or every folder is "
        "a class (default: found out, refused where in doubt)",
    )
    ratios = ",".join(map(str, _DEFAULTS.ratios))
    how = f"how images without a split of their own are divided, within each class (default: {ratios})"
    add("--ratios", type=_ratios, default=_DEFAULTS.ratios, metavar="TRAIN,VAL,TEST", help=how)
    _add_options(build, "--size", "--max-side", "--min-per-class", "--quality")
    _add_options(build, "--classes", "--shard-mb", "--seed", "--workers")
    build.set_defaults(command=_build)


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="build a set into a cache, unless it is there; what training does with a folder of images",
        description="Build a shard set of the images of SOURCE into a folder of CACHE that is named after them, unless "
        "one of these very images and options is there already. Prints that folder.",
    )
    cache.add_argument("source", type=Path, metavar="SOURCE", help="class folders or a CSV file, as for build")
    cache.add_argument("cache", type=Path, metavar="CACHE", help="folder of such sets")
    _add_options(cache, "--size", "--max-side", "--workers")
    cache.set_defaults(command=_cache)


def _add_adopt(commands: Any) -> None:
    adopt = commands.add_parser(
        "adopt",
        help="make a shard set of tars that are there, without copying them",
        description="Index the tars in FOLDER, as the webdataset library or img2dataset wrote them, and write their "
        "manifest. Each sample needs one image (jpg, jpeg, png, webp) and its class id, decimal, as .cls. Nothing is "
        "written unless all tars are usable.",
    )
    add = adopt.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of the tars; becomes the shard set")
    split = "the split of all tars (default: by their names, train-..., val-..., test-...)"
    add("--split", choices=SPLITS, help=split)
    ratios = "draw the split of each tar, in these shares of all tars"
    add("--ratios", type=_ratios, metavar="TRAIN,VAL,TEST", help=ratios)
    add("--no-decode", action="store_true", help="do not decode every image to find those that fail")
    _add_options(adopt, "--classes", "--seed", "--workers")
    adopt.set_defaults(command=_adopt)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="draw the embedded demo data and build a shard set from it",
        description="Draw pictures of made-up characters, with tags, and build the shard set OUT from them.",
    )
    add = demo.add_argument
    out = "folder of the shard set (default: %(default)s)"
    add("out", type=Path, nargs="?", default=Path("data/demo"), metavar="OUT", help=out)
    add("--characters", type=int, default=40, metavar="N", help="classes (default: %(default)s)")
    add("--pictures", type=int, default=8000, metavar="N", help="images in all (default: %(default)s)")
    add("--size", type=int, default=96, metavar="S", help="side of an image (default: %(default)s)")
    _add_options(demo, "--shard-mb", "--seed", "--workers")
    demo.set_defaults(command=_demo)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="check every byte of a shard set",
        description="Compare the shard set SET with its manifest and indexes, and decode every image. Prints one line "
        "per difference and exits 1 if there is any.",
    )
    verify.add_argument("set", metavar="SET", help="folder of the shard set")
    fix_index = "first write missing or wrong .idx and .crc files from their tars"
    verify.add_argument("--fix-index", action="store_true", help=fix_index)
    _add_options(verify, "--workers")
    verify.set_defaults(command=_verify)


def _add_info(commands: Any) -> None:
    description = "Say what is in the shard set SET, by its manifest."
    info = commands.add_parser("info", help="say what is in a shard set", description=description)
    info.add_argument("set", metavar="SET", help="folder or URL of the shard set")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.set_defaults(command=_info)


if __name__ == "__main__":
    sys.exit(main())
