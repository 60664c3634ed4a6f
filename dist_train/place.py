"""Where a process stands in its job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among world_size, and its GPU (None on the CPU)."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device_id: int | None = None
