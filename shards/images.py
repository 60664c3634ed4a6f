"""Converts a source image for a shard: decoded as `dist_train.data.images` says, resized, encoded as JPEG.

What needs no change is kept byte for byte. What fails raises `BadImage`, which the builder notes and leaves out.
"""

from __future__ import annotations

import io

from PIL import Image

from dist_train.data.images import BadImage, decode, read_header


def convert(data: bytes, size: int | None = None, max_side: int | None = None, quality: int = 92) -> bytes:
    """The JPEG that goes into a shard for an encoded image of any known format.

    The image becomes upright RGB on white. It is resized to `size` x `size` pixels, or shrunk so that its longer side
    is at most `max_side` pixels (bilinear with antialiasing), and encoded with chroma subsampling 4:2:0 and without
    metadata. A plain JPEG in colour that none of this would change, with nothing behind it, is returned byte for byte.

    Raises BadImage.
    """
    rgb = decode(data)
    target = _target_size(rgb.size, size, max_side)
    header = read_header(data)
    if target == rgb.size and header and header.kind == "jpeg" and header.plain and header.colour and not header.tail:
        return data
    try:
        if target != rgb.size:
            rgb = rgb.resize(target, Image.Resampling.BILINEAR)
        rgb.info = {}  # or Pillow would write the source's comment into the JPEG
        encoded = io.BytesIO()
        rgb.save(encoded, "JPEG", quality=quality, subsampling="4:2:0")
    except Exception as error:  # e.g. more than 65,500 pixels on a side
        raise BadImage("cannot convert", f"{type(error).__name__}: {error}") from None
    return encoded.getvalue()


def _target_size(size: tuple[int, int], square: int | None, max_side: int | None) -> tuple[int, int]:
    """(width, height) after the resize that was asked for."""
    if square is not None:
        return square, square
    longer = max(size)
    if max_side is None or longer <= max_side:
        return size
    return max(1, round(size[0] * max_side / longer)), max(1, round(size[1] * max_side / longer))
