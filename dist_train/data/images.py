"""What an image file is and how it looks: one answer for build, adopt, verify, training, evaluation and prediction.

The content decides, never the ending. A JPEG, PNG or WebP is plain if its structure is whole and nothing in it is read
differently by different decoders; `read_header` finds that out without decoding. Plain files go to DALI as they are.
All others, and what DALI refuses, are what `decode` makes of them, wherever they are met: Pillow's first frame, turned
upright by EXIF or XMP, on white, 8-bit RGB. What it refuses is refused everywhere.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from dist_train.config import DataConfig

ImageFile.LOAD_TRUNCATED_IMAGES = False  # a truncated image fails, whatever else was imported
warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; a filter for each call would not be thread-safe

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
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=[\"']|>)([0-9])")

# The first bytes of the formats above; DIB has none of its own.
_SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "WEBP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "PPM": rb"P[1-6]\s+[\d#]",
        "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        "AVIF": rb"....ftypavi[fs]",
    }.items()
    if name in FORMATS
}
SIGNATURE_BYTES = 32
"""So much of a file's start shows its format."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SOS, _EOI, _DHT, _PROGRESSIVE = 0xDA, 0xD9, 0xC4, 0xC2
_SEGMENT = struct.Struct(">BBH").unpack_from  # 0xFF, marker, length of what follows with these two bytes
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, 0xCC}  # start-of-frame markers (ITU-T T.81, table B.1)
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a stuffed zero, restart marker or fill byte
_USUAL_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2))


class BadImage(Exception):
    """An image that cannot be used. reason: a short stable category; detail: the message behind it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Header(NamedTuple):
    """What a file says before it is decoded.

    kind: jpeg, png or webp. width, height: as stored, pixels, 0 if not found. plain: whole, and every decoder reads it
    alike. colour: stored in colour, not in shades of grey. tail: bytes that follow the image, such as further images.
    """

    kind: str
    width: int
    height: int
    plain: bool
    colour: bool = True
    tail: int = 0


def format_by_content(start: bytes) -> str | None:
    """The image format that a file's first `SIGNATURE_BYTES` announce, one of FORMATS; None if it is none of them."""
    return next((name for name, pattern in _SIGNATURES.items() if pattern.match(start)), None)


def read_header(data: bytes) -> Header | None:
    """Look at the structure of a JPEG, PNG or WebP without decoding it; None if it is none of them."""
    if data.startswith(b"\xff\xd8"):
        return _read_jpeg(data)
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _read_webp(data)
    return None


def decode(data: bytes, max_pixels: int = DataConfig.max_pixels) -> Image.Image:
    """An encoded image of any known format as everyone sees it: the first frame, upright, RGB, 8 bits a channel.

    Transparency is laid on white, 16-bit grey is scaled to 8 bits, CMYK is converted by Pillow without profiles.
    Metadata that is damaged or too large makes no image unusable.

    Raises BadImage if the data is empty, of no known format, damaged, cut short, or announces more pixels than
    `max_pixels`, or if its pixels have no agreed range.
    """
    if not data:
        raise BadImage("empty file", "0 bytes")
    header = read_header(data)
    if header is not None:
        check_pixels(header.width, header.height, max_pixels)
        if header.kind == "png":
            _check_png_sums(data)
    try:
        image = _load(data, max_pixels)
    except BadImage as error:
        bare = _without_metadata(data)
        if bare is None or error.reason == "decompression bomb":
            raise
        image = _load(bare, max_pixels)
    return as_seen(image)


def as_seen(image: Image.Image) -> Image.Image:
    """A loaded image as `decode` gives it: upright, RGB, 8 bits a channel, on white. Raises BadImage."""
    try:
        turn = _TO_UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except BadImage:
        raise
    except Exception as error:  # e.g. a mode without conversion
        raise BadImage("cannot convert", f"{type(error).__name__}: {error}") from None


def to_ppm(rgb: Image.Image) -> bytes:
    """An RGB image as a binary PPM: pixels behind a line, which DALI reads on every device and nobody misreads."""
    return b"P6 %d %d 255\n" % rgb.size + rgb.tobytes()


# ---------------------------------------------------------------------- headers


def _read_jpeg(data: bytes) -> Header:
    """Segments must follow each other up to the first scan, scans up to the end-of-image marker (T.81, B.1.1).

    Where a marker of another kind stands in a scan, the scan is damaged, and decoders differ in what they make of it.
    """
    width = height = 0
    components: list[tuple[int, int]] = []  # (id, sampling factors)
    plain, exif, adobe, frame = True, False, 1, 0
    at, kind = 2, 0  # after the start-of-image marker
    while kind != _SOS:
        start, kind, length = _SEGMENT(data, at) if at + 4 <= len(data) else (0, 0, 0)
        body, at = at + 4, at + 2 + length
        if start != 0xFF or not 0xC0 <= kind <= 0xFE or length < 2 or at > len(data):
            return Header("jpeg", width, height, False)
        if kind in _FRAMES:
            segment = data[body:at]
            plain &= not frame and kind in (0xC0, 0xC1, _PROGRESSIVE) and len(segment) >= 9 and segment[0] == 8
            frame = kind
            height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            components = [(segment[i], segment[i + 1]) for i in range(6, len(segment) - 2, 3)]
        elif kind == 0xE1 and data.startswith(b"Exif\0\0", body):
            plain &= not exif and not _exif_may_turn(data[body + 6 : at])
            exif = True
        elif kind == 0xE1:
            plain &= not _xmp_may_turn(data[body:at])
        elif kind == 0xEE and data.startswith(b"Adobe", body):
            adobe = data[body + 11] if length >= 14 else -1
    colour = len(components) == 3
    if colour:  # YCbCr, with both colour planes at the same usual size
        luma, *chroma = [(factors >> 4, factors & 15) for _, factors in components]
        plain &= luma in _USUAL_SAMPLING and chroma == [(1, 1), (1, 1)]
        plain &= adobe == 1 and [number for number, _ in components] != list(b"RGB")
    plain &= len(components) in (1, 3) and width * height > 0 and adobe >= 0
    plain &= frame == _PROGRESSIVE or int.from_bytes(data[body : body + 1], "big") == len(components)  # all in one scan
    end = _end_of_scans(data, at, frame == _PROGRESSIVE)
    return Header("jpeg", width, height, plain and end > 0, colour, len(data) - end)


def _end_of_scans(data: bytes, at: int, progressive: bool) -> int:
    """Where the image ends whose first scan has its pixels from `at` on; 0 if its scans do not lead to an end."""
    while (found := _MARKER_IN_SCAN.search(data, at)) is not None:
        at, kind = found.start(), 0
        if data[at + 1] == _EOI:
            return at + 2
        if not progressive:
            return 0
        while kind != _SOS:  # tables, and the header of the next scan
            start, kind, length = _SEGMENT(data, at) if at + 4 <= len(data) else (0, 0, 0)
            body, at = data[at + 4 : at + 2 + length], at + 2 + length
            if start != 0xFF or not body or len(body) != length - 2:
                return 0
            if not (_is_huffman_table(body) if kind == _DHT else kind == _SOS and length == 6 + 2 * body[0]):
                return 0
    return 0


def _is_huffman_table(body: bytes) -> bool:
    """Whether the body of a DHT segment holds whole tables."""
    at = 0
    while at + 17 <= len(body):
        at += 17 + sum(body[at + 1 : at + 17])  # class and number, how many codes of each length, the codes
    return at == len(body)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int, bool]]:
    """(kind, place and length of the content, whether the checksum is right) of each whole chunk."""
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if end + 4 > len(data):
            return
        yield kind, at + 8, length, zlib.crc32(data[at + 4 : end]) == int.from_bytes(data[end : end + 4], "big")
        if kind == b"IEND":
            return
        at = end + 4


def _read_png(data: bytes) -> Header:
    width = height = depth = colour_type = 0
    plain, ended, first = True, False, True
    for kind, at, length, sound in _png_chunks(data):
        plain &= sound and first == (kind == b"IHDR")
        first = False
        if kind == b"IHDR" and length == 13:
            width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(
                ">IIBBBBB", data[at : at + 13]
            )
            plain &= colour_type in (0, 2, 3) and 0 < depth <= 8 and not compression and not filtering
            plain &= interlace < 2
        elif kind == b"IEND":
            ended = True
        elif kind == b"eXIf":
            plain &= not _exif_may_turn(data[at : at + length].removeprefix(b"Exif\0\0"))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[at : at + min(length, 80)].partition(b"\0")[0]
            plain &= not keyword.startswith(b"Raw profile type") and keyword != b"XML:com.adobe.xmp"
        elif kind in (b"tRNS", b"acTL") or (kind[:1].isupper() and kind not in (b"IDAT", b"PLTE")):
            plain = False
    return Header("png", width, height, plain and ended and width * height > 0, colour_type != 0)


def _check_png_sums(data: bytes) -> None:
    """Raise BadImage if a chunk that makes the picture has a wrong checksum; Pillow does not look at those of IDAT."""
    for kind, _, _, sound in _png_chunks(data):
        if not sound and kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS"):
            raise BadImage("cannot decode", f"the checksum of its {kind.decode()} chunk is wrong")


def _read_webp(data: bytes) -> Header:
    """A RIFF file of chunks: VP8 or VP8L alone, or VP8X with what it announces (RFC 9649)."""
    width = height = 0
    plain = 8 + int.from_bytes(data[4:8], "little") == len(data)
    pictures, at = 0, 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        plain &= at + length <= len(data)
        if kind == b"VP8X" and length >= 10 and not width:
            plain &= not int.from_bytes(data[at : at + 1], "big") & 0x12  # transparency, animation
            width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (at + 4, at + 7))
        elif kind == b"VP8 ":
            pictures += 1
            size = [int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (at + 6, at + 8)]
            plain &= data[at + 3 : at + 6] == b"\x9d\x01\x2a" and [width, height] in (size, [0, 0])
            width, height = size
        elif kind == b"VP8L":
            pictures += 1
            bits = int.from_bytes(data[at + 1 : at + 5], "little")
            size = [1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)]
            plain &= data[at : at + 1] == b"\x2f" and not bits >> 28 and [width, height] in (size, [0, 0])
            width, height = size
        elif kind == b"EXIF":
            plain &= not _exif_may_turn(data[at : at + length].removeprefix(b"Exif\0\0"))
        elif kind == b"XMP ":
            plain &= not _xmp_may_turn(data[at : at + length])
        at += length + length % 2
    plain &= at == len(data) and pictures == 1
    return Header("webp", width, height, plain and width * height > 0)


def _exif_may_turn(block: bytes) -> bool:
    """Whether EXIF data, a TIFF header and its first directory, might turn the image: Pillow then decides."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None or len(block) < 8:
        return True
    start = struct.unpack_from(order + "I", block, 4)[0]
    count = struct.unpack(order + "H", block[start : start + 2])[0] if start + 2 <= len(block) else -1
    entries = block[start + 2 : start + 2 + 12 * count]
    if count < 0 or len(entries) != 12 * count:
        return True
    upright = struct.pack(order + "HHIH", _ORIENTATION_TAG, 3, 1, 1)  # one unsigned short: 1
    tag = upright[:2]
    return any(entries[i : i + 2] == tag and entries[i : i + 10] != upright for i in range(0, len(entries), 12))


def _xmp_may_turn(packet: bytes) -> bool:
    found = _XMP_ORIENTATION.search(packet)
    return found is not None and found[2] != b"1"


# ---------------------------------------------------------------------- pixels


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise BadImage for an image that announces more than `max_pixels`."""
    if width * height > max_pixels:
        raise BadImage("decompression bomb", f"announces {width} x {height} pixels; data.max_pixels is {max_pixels}")


def _load(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame, decoded whole, in the file's own mode and orientation. Raises BadImage."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # from twice its own limit on Pillow refuses, whatever is asked for
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_pixels(*image.size, max_pixels)
        image.load()
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("decompression bomb", f"announces more pixels than data.max_pixels {max_pixels}") from None
    except UnidentifiedImageError:
        raise BadImage("not an image", "none of the formats " + ", ".join(FORMATS)) from None
    except Exception as error:  # arbitrary bytes make decoders raise nearly anything
        reason = "truncated" if "truncated" in str(error).lower() else "cannot decode"
        raise BadImage(reason, f"{type(error).__name__}: {error}") from None
    return image


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG or JPEG with nothing but what makes its picture; None for other files."""
    if data.startswith(_PNG):
        kept = [
            data[at - 8 : at + length + 4]
            for kind, at, length, _ in _png_chunks(data)
            if kind[:1].isupper() or kind == b"tRNS"
        ]
        return _PNG + b"".join(kept)
    if data.startswith(b"\xff\xd8"):
        kept, at = [], 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\xda"):
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            segment = data[at:end]
            is_metadata = 0xE1 <= segment[1] <= 0xEF or segment[1] == 0xFE
            if not is_metadata or (segment[4:9] == b"Adobe" and len(segment) >= 16):
                kept.append(segment)
            at = end
        return b"\xff\xd8" + b"".join(kept) + data[at:]
    return None


def _orientation(image: Image.Image) -> int:
    """EXIF or XMP orientation of a loaded image, 1 (upright) if it has none or its metadata is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata makes no image unusable
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, 8 bits a channel. Raises BadImage for pixels without an agreed range (32-bit integers, floats)."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("unsupported pixels", "32-bit integers have no agreed range")
        scaled = ((values * 255 + 32767) // 65535).astype(np.uint8)
        scaled[values == image.info.get("transparency", -1)] = 255  # the shade that a PNG calls transparent
        return Image.fromarray(scaled).convert("RGB")
    if image.mode == "F":
        raise BadImage("unsupported pixels", "floating-point numbers have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
