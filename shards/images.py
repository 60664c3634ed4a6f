"""One source image to the bytes that go into a shard: decoded whole, upright, RGB, resized, encoded as JPEG.

What needs no change is kept byte for byte. What fails raises `BadImage`, which the builder notes and leaves out.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image fails, whatever else was imported

# Pillow's other readers are left out: some start programs (Ghostscript for EPS), none is a photo format. Its JPEG
# reader stands for MPO too; AVIF depends on how Pillow was built.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN
)

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# The first bytes of the formats above; DIB has none of its own.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s+[\d#]",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "AVIF": rb"....ftypavi[fs]",
}
_SIGNATURES = {name: re.compile(pattern, re.DOTALL) for name, pattern in _SIGNATURES.items() if name in FORMATS}
SIGNATURE_BYTES = 32
"""So much of a file's start shows its format."""


def format_by_content(start: bytes) -> str | None:
    """The image format that a file's first `SIGNATURE_BYTES` announce, one of FORMATS; None if it is none of them."""
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(start)), None)


class BadImage(Exception):
    """An image that cannot be used. reason: a short stable category; detail: the message behind it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image, decoded whole, in the file's own mode and orientation.

    Raises BadImage if the data is empty, of no known format, damaged, cut short, or announces more pixels than
    Pillow's limit (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not data:
        raise BadImage("empty file", "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("decompression bomb", str(error)) from None
    except UnidentifiedImageError:
        raise BadImage("not an image", "none of the formats " + ", ".join(FORMATS)) from None
    except Exception as error:  # arbitrary bytes make decoders raise nearly anything
        reason = "truncated" if "truncated" in str(error).lower() else "cannot decode"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from None
    return image


def convert(data: bytes, size: int | None = None, max_side: int | None = None, quality: int = 92) -> bytes:
    """The JPEG that goes into a shard for an encoded image of any known format.

    The image is turned upright by its EXIF orientation and becomes RGB: transparency is laid on white, 16-bit grey is
    scaled to 8 bits. It is resized to `size` x `size` pixels, or shrunk so that its longer side is at most `max_side`
    pixels (bilinear with antialiasing), and encoded with chroma subsampling 4:2:0 and without metadata. A JPEG that
    none of this would change is returned byte for byte.

    Raises BadImage.
    """
    image = decode(data)
    try:
        turn = _TO_UPRIGHT.get(_orientation(image))
        if turn is None and _target_size(image.size, size, max_side) == image.size and _is_plain_jpeg(image, data):
            return data
        rgb = _to_rgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
        target = _target_size(rgb.size, size, max_side)
        if target != rgb.size:
            rgb = rgb.resize(target, Image.Resampling.BILINEAR)
        rgb.info = {}  # or Pillow would write the source's comment into the JPEG
        encoded = io.BytesIO()
        rgb.save(encoded, "JPEG", quality=quality, subsampling="4:2:0")
    except BadImage:
        raise
    except Exception as error:  # e.g. a mode without conversion, more than 65,500 pixels on a side
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


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 (upright) if it has none or its EXIF block is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata makes no image unusable
        return 1
    return value if isinstance(value, int) else 1


def _is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether every JPEG decoder reads it alike: YCbCr, a usual subsampling, no stray bytes in its header."""
    if image.format != "JPEG" or image.mode != "RGB":
        return False
    components = image.layer  # (id, horizontal, vertical sampling factor, quantisation table) of each
    stored_as_rgb = image.info.get("adobe_transform", 1) != 1 or [c[0] for c in components] == list(b"RGB")
    luma, *chroma = [component[1:3] for component in components]
    usual_sampling = luma in ((1, 1), (2, 1), (1, 2), (2, 2)) and all(factors == (1, 1) for factors in chroma)
    return not stored_as_rgb and usual_sampling and _has_clean_header(data)


def _has_clean_header(data: bytes) -> bool:
    """Whether marker segment follows marker segment up to the first scan (ITU-T T.81, B.1.1); DALI insists on it."""
    at = 2  # after the start-of-image marker
    while at + 4 <= len(data) and data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xFE:
        if data[at + 1] == 0xDA:  # start of scan
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel. Raises BadImage for pixels without an agreed range (32-bit integers, floats)."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("unsupported pixels", "32-bit integers have no agreed range")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("unsupported pixels", "floating-point numbers have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
