"""The size that an encoded image announces, read from its header alone, before a decoder allocates memory for it."""

from __future__ import annotations

MAX_PIXELS = 89_478_485
"""Pillow's limit: a quarter of a GiB at 3 bytes a pixel."""

_PNG = b"\x89PNG\r\n\x1a\n"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the others are tables and extensions


def announced_size(encoded: memoryview) -> tuple[int, int]:
    """(width, height) in pixels of a JPEG, PNG or WebP.

    Raises ValueError, with the reason, for other formats and for headers from which no size can be read.
    """
    if encoded[:2] == b"\xff\xd8":
        return _jpeg_size(encoded)
    if encoded[:8] == _PNG:
        if encoded[12:16] != b"IHDR" or len(encoded) < 24:
            raise ValueError("a PNG without image header")
        return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" and len(encoded) >= 30:
        return _webp_size(encoded)
    raise ValueError("not a JPEG, PNG or WebP" if len(encoded) else "empty")


def _jpeg_size(encoded: memoryview) -> tuple[int, int]:
    """Walks the marker segments (ITU-T T.81, B.1.1) up to the frame header."""
    at = 2
    while at + 9 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker in _START_OF_FRAME:
            return int.from_bytes(encoded[at + 7 : at + 9], "big"), int.from_bytes(encoded[at + 5 : at + 7], "big")
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        # A marker may be preceded by any number of fill bytes.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    raise ValueError("a JPEG without frame header, or with a damaged one")


def _webp_size(encoded: memoryview) -> tuple[int, int]:
    """Canvas of an extended file, else the size of the one frame (RFC 9649, sections 2.5 to 2.7)."""
    kind = bytes(encoded[12:16])
    if kind == b"VP8X":
        return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = (int.from_bytes(encoded[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return width, height
    raise ValueError("a WebP of unknown kind")
