"""Where images are decoded."""

from __future__ import annotations

from dist_train.config import DataConfig
from dist_train.errors import UseError


def decoding_gpu(config: DataConfig, gpu: int | None) -> int | None:
    """The GPU that decodes for a process with this one (None: without any), or None for the CPU.

    Raises UseError if a GPU is asked for and missing.
    """
    if config.device == "gpu" and gpu is None:
        raise UseError("data.device is gpu, but this machine has none; use cpu or auto")
    return None if config.device == "cpu" else gpu
