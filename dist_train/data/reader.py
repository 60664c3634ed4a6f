"""Encoded images from anywhere, in batches, as an evaluation sees those of a shard set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from nvidia.dali.tensors import TensorCPU
from PIL import Image
from torch import Tensor

from dist_train.config import DataConfig
from dist_train.data.augment import no_augmentation
from dist_train.data.images import BadImage, decode, to_ppm
from dist_train.data.pipeline import ImagePipeline, UndecodableError, load_compiled_passes
from dist_train.data.sample import plain_size

ReadImage = Callable[[], bytes]
"""Gives an image file's content; raises OSError or BadImage where there is none."""


@dataclass
class _Encoded:
    """An image as DALI gets it. size: (width, height), pixels. original: the file itself, where that is what DALI gets;
    DALI may refuse it."""

    image: TensorCPU
    size: tuple[int, int]
    original: bytes | None = None


class ImageReader:
    """Reads images with pipelines that are kept, as on a GPU it takes more than a second to build one.

    device_id: the GPU, or None for the CPU. batch_size: images read together. threads: that read and decode.
    """

    def __init__(self, config: DataConfig, device_id: int | None, batch_size: int = 1, threads: int = 1) -> None:
        if device_id is None:
            load_compiled_passes()
        self._config, self._device_id, self._workers = config, device_id, threads
        self.batch_size = batch_size
        self._threads = ThreadPoolExecutor(threads, "read")
        self._pipelines: dict[int, ImagePipeline] = {}  # by batch size: of whole batches, of single images

    def read(self, data: bytes) -> Tensor:
        """One image, (1, 3, S, S), normalised, on the device. Raises BadImage."""
        images, problems = self.read_batch([lambda: data])
        for problem in problems.values():
            raise problem
        return images[:1]

    def read_batch(self, files: Sequence[ReadImage]) -> tuple[Tensor, dict[int, BadImage | OSError]]:
        """At most `batch_size` images: (batch_size, 3, S, S), normalised, on the device, and why some have no picture.

        A row is grey where its file has no picture and where there is no file for it, so all batches have one shape.
        """
        encoded: list[_Encoded] = []
        problems: dict[int, BadImage | OSError] = {}
        for i, read in enumerate(self._threads.map(self._encoded, files)):
            if isinstance(read, _Encoded):
                encoded.append(read)
            else:
                encoded.append(self._stand_in)
                problems[i] = read
        encoded += [self._stand_in] * (self.batch_size - len(files))
        try:
            return self._decode(encoded), problems
        except UndecodableError as error:  # DALI gives up the whole batch and does not say for which image
            refused = error
        rows = []
        for i, one in enumerate(encoded):
            try:
                rows.append(self._decode_alone(one, refused if len(encoded) == 1 else None))
            except BadImage as problem:
                rows.append(self._decode([self._stand_in]))
                problems[i] = problem
        return torch.cat(rows), problems

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()
        for size in list(self._pipelines):
            self._pipelines.pop(size).close()

    def _encoded(self, read: ReadImage) -> _Encoded | BadImage | OSError:
        """A file as DALI may have it: as it is, or converted."""
        try:
            data = read()
            size = plain_size(data, self._config.max_pixels)
            if size is not None:
                return _Encoded(TensorCPU(np.frombuffer(data, np.uint8)), size, data)
            return self._converted(data)
        except (BadImage, OSError) as problem:
            return problem

    def _converted(self, data: bytes) -> _Encoded:
        image = decode(data, self._config.max_pixels)
        return _Encoded(TensorCPU(np.frombuffer(to_ppm(image), np.uint8)), image.size)

    def _decode_alone(self, one: _Encoded, refused: UndecodableError | None) -> Tensor:
        """(1, 3, S, S). As in the loader, what DALI refuses is converted. Raises BadImage.

        refused: what DALI has said of this image already, if it was asked for it alone.
        """
        if refused is None:
            try:
                return self._decode([one])
            except UndecodableError as error:
                refused = error
        if one.original is None:
            raise BadImage("cannot decode", refused.reason()) from None
        return self._decode_alone(self._converted(one.original), None)

    def _decode(self, images: list[_Encoded]) -> Tensor:
        """Raises UndecodableError, which leaves a pipeline unusable."""
        size = len(images)
        if size not in self._pipelines:
            self._pipelines[size] = ImagePipeline(
                self._config,
                train=False,
                baked=None,
                batch_size=size,
                threads=min(size, self._workers),
                device_id=self._device_id,
                depth=1,
            )
        try:
            sizes = np.array([image.size[::-1] for image in images], np.int32)
            self._pipelines[size].feed([image.image for image in images], no_augmentation(size), sizes)
            return self._pipelines[size].take()
        except UndecodableError:
            self._pipelines.pop(size).close()
            raise

    @cached_property
    def _stand_in(self) -> _Encoded:
        """A grey image."""
        side = self._config.image_size
        image = Image.new("RGB", (side, side), (128, 128, 128))
        return _Encoded(TensorCPU(np.frombuffer(to_ppm(image), np.uint8)), image.size)
