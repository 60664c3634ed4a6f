"""Encoded images from anywhere, one at a time, as an evaluation sees those of a shard set."""

from __future__ import annotations

import numpy as np
from nvidia.dali.tensors import TensorCPU
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.augment import no_augmentation
from dist_train.data.images import BadImage, decode, to_ppm
from dist_train.data.pipeline import ImagePipeline, UndecodableError
from dist_train.data.sample import plain_size


class ImageReader:
    """Reads images with one pipeline, which takes more than a second to build on a GPU, as long as none is bad.

    device_id: the GPU, or None for the CPU.
    """

    def __init__(self, config: DataConfig, device_id: int | None) -> None:
        self._config, self._device_id = config, device_id
        self._pipeline: ImagePipeline | None = None

    def read(self, data: bytes) -> Tensor:
        """(1, 3, S, S), normalised, on the device. Raises BadImage."""
        size = plain_size(data, self._config.max_pixels)
        if size is not None:
            try:
                return self._decode(data, size)
            except UndecodableError:
                pass  # as the loader does, what DALI refuses is converted
        image = decode(data, self._config.max_pixels)
        try:
            return self._decode(to_ppm(image), image.size)
        except UndecodableError as error:
            raise BadImage("cannot decode", error.reason()) from None

    def close(self) -> None:
        """End the pipeline's threads."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def _decode(self, encoded: bytes, size: tuple[int, int]) -> Tensor:
        """size: (width, height)."""
        if self._pipeline is None:
            self._pipeline = ImagePipeline(
                self._config, train=False, baked=None, batch_size=1, threads=1, device_id=self._device_id, depth=1
            )
        try:
            sizes = np.array([size[::-1]], np.int32)
            self._pipeline.feed([TensorCPU(np.frombuffer(encoded, np.uint8))], no_augmentation(1), sizes)
            return self._pipeline.take()
        except UndecodableError:  # which leaves the pipeline unusable
            self.close()
            raise
