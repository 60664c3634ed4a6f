"""What training, evaluation and prediction see of an image, as pixels from 0 to 255."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.augment import draw_augmentation
from dist_train.data.images import BadImage
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.reader import ImageReader
from dist_train.place import Place
from tests.harness import smooth_image

SIDE, MARGIN = 24, 8
# Between Pillow's resize, which rounds to integers between its two passes, and ours, which does not.
ROUNDING = 2


def data_config(root: Path, **changes: object) -> DataConfig:
    """Of a recipe that changes no colours."""
    still = {"flip": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    limits = {"threads": 2, "max_bad_samples": 1000, "shuffle_window": 64}
    return DataConfig(shards=str(root), image_size=SIDE, crop_margin=MARGIN, **still | limits | changes)


def to_pixels(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A model's input (3, S, S) as (S, S, 3) in [0, 255]."""
    return (image.transpose(1, 2, 0) + 1) * 127.5


def evaluated(root: Path) -> dict[int, NDArray[np.float32]]:
    """What an evaluation of the train split sees, by sample; without what it leaves out."""
    loader = EvalLoader(data_config(root), read_manifest(root), "train", Place(), batch_size=64)
    return {
        int(sample): to_pixels(image.numpy())
        for batch in loader
        for sample, weight, image in zip(batch.samples, batch.weights, batch.images, strict=True)
        if weight
    }


def trained(root: Path, seed: int = 0) -> dict[int, tuple[NDArray[np.float32], tuple[int, int]]]:
    """What an epoch of training sees, by sample, and where (y, x) of the resized square it was cut."""
    config, manifest = data_config(root), read_manifest(root)
    samples = manifest.split("train").samples
    batch_size = next(size for size in range(min(samples, 97), 0, -1) if samples % size == 0)
    loader = iter(TrainLoader(config, manifest, Place(), batch_size=batch_size, micro_batch=batch_size, seed=seed))
    seen = {}
    for _ in range(samples // batch_size):
        batch = next(loader)
        crops = draw_augmentation(config, seed, np.zeros_like(batch.samples), batch.samples).crop.tolist()
        for sample, weight, image, crop in zip(batch.samples, batch.weights, batch.images, crops, strict=True):
            if weight:
                seen[int(sample)] = to_pixels(image.numpy()), tuple(crop)
    return seen


def predicted(root: Path, files: list[bytes]) -> dict[int, NDArray[np.float32]]:
    """What predict sees of files, by place."""
    seen = {}
    reader = ImageReader(data_config(root), None)
    for i, data in enumerate(files):
        try:
            seen[i] = to_pixels(reader.read(data)[0].numpy())
        except BadImage:
            continue
    reader.close()
    return seen


def resized(image: Image.Image, side: int) -> NDArray[np.float32]:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).astype(np.float32)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_with(*chunks: tuple[bytes, bytes], spoil: bytes = b"") -> bytes:
    """A PNG of a picture with chunks put before its pixels; `spoil` gets a wrong checksum."""
    data = encode(smooth_image(3, 40, 32), "PNG")
    added = b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content) ^ (kind == spoil))
        for kind, content in chunks
    )
    return data[:33] + added + data[33:]


def jpeg_with(*segments: tuple[int, bytes], tail: bytes = b"") -> bytes:
    data = encode(smooth_image(3, 40, 32), "JPEG", quality=98, subsampling="4:4:4")
    added = b"".join(b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    return data[:2] + added + data[2:] + tail
