"""Counter-based random numbers: a draw is a pure function of its counters, so nothing depends on who draws when.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014; constants by Stafford, "Mix13"), applied once per
counter. Vectorised over numpy arrays of counters.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counter = int | NDArray[np.integer]


class Draw(IntEnum):
    """What a draw of a run is for: its first counter after the seed. A number stands for the same in every version."""

    SHARDS = 1
    WINDOWS = 2
    AUGMENTATION = 3
    DROPOUT = 4
    WEIGHTS = 5
    TAG_ORDER = 6
    MIXING = 7
    BOXES = 8
    AUTO_AUGMENT = 9


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MOST = 2**64 - 1


def random_bits(*counters: Counter) -> NDArray[np.uint64]:
    """64 random bits for each combination of the counters (non-negative integers, broadcast together).

    Of numbers alone the bits are a number too, np.uint64.
    """
    number, rest = 0, 0  # counters in front that are numbers are mixed as such, in a tenth of the time
    while rest < len(counters) and isinstance(counters[rest], int):
        number = _mix_number(((number ^ int(counters[rest])) * _GOLDEN + _GOLDEN) & _MOST)
        rest += 1
    state: Any = np.uint64(number)
    if rest < len(counters):
        golden = np.uint64(_GOLDEN)
        with np.errstate(over="ignore"):  # wrapping around 2**64 is what the mixer is made of
            for counter in counters[rest:]:
                state = _mix((state ^ np.asarray(counter).astype(np.uint64)) * golden + golden)
    return state


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """In place: memory for what lies between would take longer than the arithmetic."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(_FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return x


def _mix_number(x: int) -> int:
    x = ((x ^ (x >> 30)) * _FIRST) & _MOST
    x = ((x ^ (x >> 27)) * _SECOND) & _MOST
    return x ^ (x >> 31)


def uniform(*counters: Counter) -> NDArray[np.float64]:
    """Uniform in [0, 1), 53 bits, for each combination of the counters."""
    return np.asarray((random_bits(*counters) >> np.uint64(11)) * 2.0**-53, np.float64)


def permutation(length: int, *counters: Counter) -> NDArray[np.int64]:
    """A random permutation of range(length); counters of shape (N, 1) give N of them, (N, length).

    Ties of the 64-bit sort keys fall back to the order of the indexes.
    """
    return np.argsort(random_bits(*counters, np.arange(length)), axis=-1, kind="stable")
