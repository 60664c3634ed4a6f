"""What a model can be asked about: files, folders of them, and images in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dist_train.data.folder import images_below
from dist_train.data.images import BadImage, as_seen, to_ppm
from dist_train.errors import UseError

OneImage = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A file or a folder; an encoded image; one of Pillow; an array (H, W, 3) or (H, W) of uint8, RGB or grey."""


@dataclass(frozen=True)
class Picture:
    """One image to be asked about. path: its file, None for one in memory; content: what is in memory."""

    path: Path | None = None
    content: bytes | Image.Image | NDArray[np.uint8] = b""

    def read(self) -> bytes:
        """The encoded image. Raises OSError or BadImage."""
        if self.path is not None:
            return self.path.read_bytes()
        if isinstance(self.content, bytes):
            return self.content
        image = self.content if isinstance(self.content, Image.Image) else _of_array(self.content)
        try:
            image.load()
        except Exception as error:  # of a file that Pillow has opened and not read: each format has errors of its own
            raise BadImage("cannot decode", f"{type(error).__name__}: {error}") from None
        return to_ppm(as_seen(image))


def pictures(images: OneImage | Iterable[OneImage]) -> list[Picture]:
    """The pictures that are meant, in order: of a folder all image files in it and below it (`images_below`).

    Files are not read here: one that is not there is told when its turn comes. Raises UseError for a folder without
    images and for what is no image at all.
    """
    single = isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray)
    found: list[Picture] = []
    for one in [images] if single else images:  # type: ignore[union-attr]  # which mypy cannot tell
        if isinstance(one, str | os.PathLike):
            path = Path(one)
            if path.is_dir():
                below = images_below(path)
                if not below:
                    raise UseError(f"{path}: no images in this folder")
                found += [Picture(image) for image in below]
            else:
                found.append(Picture(path))
        elif isinstance(one, bytes | Image.Image | np.ndarray):
            found.append(Picture(content=one))
        else:
            raise UseError(f"not an image: {type(one).__name__}; give a path, bytes, an image of Pillow or an array")
    return found


def _of_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise BadImage(
            "unsupported pixels", f"an array of {array.dtype} and shape {array.shape}; give uint8, (H, W, 3) or (H, W)"
        )
    return Image.fromarray(array)
