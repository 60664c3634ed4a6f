"""Which values the numbers of a recipe may have, and the one sentence for what lies outside."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from dist_train.errors import UseError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; above, below: not these themselves."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least < value if self.above else self.least <= value)
            and (value < self.most if self.below else value <= self.most)
        )

    def __str__(self) -> str:
        ends = [f"{'above' if self.above else 'at least'} {self.least:,}"] if self.least > -math.inf else []
        ends += [f"{'below' if self.below else 'at most'} {self.most:,}"] if self.most < math.inf else []
        return " and ".join(ends) or "a finite number"


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_1 = Range(1)
SHARE = Range(0, 1, below=True)  # of a whole, or a rate of decay: 1 would leave nothing of what is new
STRENGTH = Range(0, 1)


def ranges_of(section: type) -> dict[str, Range]:
    """The ranges of a section's numbers by key: those in the types of its fields, as Annotated[float, Range(0, 1)]."""
    hints = get_type_hints(section, include_extras=True)
    return {key: part for key, hint in hints.items() for part in get_args(hint)[1:] if isinstance(part, Range)}


def check_ranges(recipe: Any) -> None:
    """Raise UseError for the first number of a recipe that cannot be."""
    for section in fields(recipe):
        check_section(section.name, getattr(recipe, section.name))


def check_section(section: str, config: Any) -> None:
    """The same for one section: `data` with its DataConfig, and so on."""
    for key, allowed in ranges_of(type(config)).items():
        value = getattr(config, key)
        if isinstance(value, str):  # auto, for which numbers will stand
            continue
        several = isinstance(value, tuple)
        for number in value if several else (value,):
            if number not in allowed:
                each, written = ("each of them", list(value)) if several else ("it", value)
                limits = allowed if math.isfinite(number) else "a finite number"
                raise UseError(f"{section}.{key} is {written}; {each} must be {limits}")
