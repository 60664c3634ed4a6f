"""Counter-based random numbers: a draw is a pure function of its counters, so nothing depends on who draws when.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014; constants by Stafford, "Mix13"), applied once per
counter. Vectorised over numpy arrays of counters.
"""

from __future__ import annotations

from enum import IntEnum

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


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(*counters: Counter) -> NDArray[np.uint64]:
    """64 random bits for each combination of the counters (non-negative integers, broadcast together)."""
    if all(isinstance(counter, int) for counter in counters):
        return _random_bits_of_numbers(counters)
    with np.errstate(over="ignore"):  # wrapping around 2**64 is what the mixer is made of
        state = np.zeros(1, np.uint64)
        for counter in counters:
            state = _mix((state ^ np.asarray(counter).astype(np.uint64)) * _GOLDEN + _GOLDEN)
    return state if any(np.ndim(counter) for counter in counters) else state[0]


def _random_bits_of_numbers(counters: tuple[int, ...]) -> np.uint64:
    """The same without arrays, a tenth of the time: a training step draws the seed of its dropout by it."""
    state, wrap, golden = 0, 2**64 - 1, int(_GOLDEN)
    for counter in counters:
        state = ((state ^ int(counter)) * golden + golden) & wrap
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & wrap
        state ^= state >> 31
    return np.uint64(state)


def uniform(*counters: Counter) -> NDArray[np.float64]:
    """Uniform in [0, 1), 53 bits, for each combination of the counters."""
    return (random_bits(*counters) >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *counters: Counter) -> NDArray[np.int64]:
    """A random permutation of range(length); counters of shape (N, 1) give N of them, (N, length).

    Ties of the 64-bit sort keys fall back to the order of the indexes.
    """
    return np.argsort(random_bits(*counters, np.arange(length)), axis=-1, kind="stable")
