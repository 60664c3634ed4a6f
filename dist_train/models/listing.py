"""The backbones that there are, as `dist-train models` lists them: size, and what heads and text go with each."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator

import timm

import dist_train.models.own  # noqa: F401  # timm lists what it was told of
from dist_train.errors import UseError
from dist_train.models.backbones import timm_name
from dist_train.models.names import CNNS, VIT_SIZES, abilities, is_paper_name
from dist_train.models.timm_models import inspect

PAPER_NAMES = [*CNNS, *(f"vit_{size}_patch{patch}" for size in VIT_SIZES for patch in (16, 32))]
"""The paper's; of its ViTs, which take any patch size, the usual ones."""
_PAPER_SIZE = 224


def list_models(pattern: str | None) -> Iterator[str]:
    """A line for each backbone whose name has the pattern in it, or fits it where it has a wildcard; each is looked at
    as it is yielded, which takes about a second. Without a pattern: the paper's names, and timm's families by number of
    models, without looking. Raises UseError where no name fits.
    """
    if pattern is None:
        yield from _table([(name, "") for name in PAPER_NAMES])
        yield ""
        yield "and timm's models, by family; `dist-train models PATTERN` lists those with PATTERN in their name:"
        yield from _families()
        return
    wanted = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    papers = [name for name in PAPER_NAMES if fnmatch.fnmatchcase(name, wanted)]
    timms = [name for name in timm.list_models(wanted) if name not in papers]
    if not papers and not timms:
        raise UseError(f"models: no backbone's name fits {wanted}; without a pattern the families are listed")
    yield from _table([*((name, "") for name in papers), *((name, ", ".join(_tags(name))) for name in timms)])


def _table(names: list[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in names)
    yield f"{'backbone':{width}}  parameters  pixels  ifa  text  weights"
    for name, tags in names:
        try:
            yield f"{name:{width}}  {_row(name)}  {tags}".rstrip()
        except UseError as error:
            yield f"{name:{width}}  cannot be used: {error}"


def _row(name: str) -> str:
    size = _usual_size(name)
    traits = inspect(timm_name(name, size)[0], size)
    can = abilities(name, size)
    ifa, text = ("yes" if ability else "no" for ability in (can.per_block, can.text))
    pixels = "any" if is_paper_name(name) else str(size)
    return f"{traits.parameters / 1e6:8.1f} M  {pixels:>6}  {ifa:3}  {text:4}"


def _usual_size(name: str) -> int:
    described = None if is_paper_name(name) else timm.get_pretrained_cfg(name)
    return _PAPER_SIZE if described is None else described.input_size[-1]


def _tags(name: str) -> list[str]:
    """The tags of the pretrained weights, timm's default first."""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    described = timm.get_pretrained_cfg(name)
    return sorted(tags, key=lambda tag: (described is None or tag != described.tag, tag))


def _families() -> Iterator[str]:
    counts = Counter({family: len(timm.list_models(module=family)) for family in timm.list_modules()})
    for family, count in sorted(counts.items()):
        if count:
            yield f"  {family:32} {count:4}  as {timm.list_models(module=family)[0]}"
