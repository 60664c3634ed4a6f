"""What a backbone can do. Imports nothing slow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Abilities:
    """What a backbone can do, by which a recipe is checked."""

    tokens: bool
    """It is a sequence of blocks that hand on tokens."""
    per_block: bool
    """It gives every block's [CLS]."""
    text: bool
    """Its blocks take text tokens and a mask."""
    batch_norms: bool
    """It has some."""
    recomputes: bool
    """It can compute its blocks again in the backward pass."""
    layers: int
    """Layers behind the stem, as model.freeze counts them."""
