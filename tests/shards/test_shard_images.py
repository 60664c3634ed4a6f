"""Promises of shards.images: what one image becomes, and why one is left out."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_train.data.images import BadImage
from shards.images import convert

ROBUSTNESS = Path(__file__).parents[2] / "../shared/data/robustness"
needs_robustness = pytest.mark.skipif(not ROBUSTNESS.is_dir(), reason=f"the odd images are absent: {ROBUSTNESS}")

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def four_corners() -> np.ndarray:
    """64 x 96 pixels (height x width), each corner of its own colour."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48], pixels[32:, 48:] = RED, GREEN, BLUE, WHITE
    return pixels


def encode(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return np.asarray(image).astype(int)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# Where row 0 and column 0 of the stored pixels lie in the upright image, from the table in EXIF 2.32, 4.6.4.A.
STORED = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def store(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The stored pixels of an upright image."""
    first_row, first_column = STORED[orientation]
    pixels = upright[::-1] if "bottom" in (first_row, first_column) else upright
    pixels = pixels[:, ::-1] if "right" in (first_row, first_column) else pixels
    return pixels.transpose(1, 0, 2) if first_row in ("left", "right") else pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(store(four_corners(), orientation)), kind, exif=exif)
    assert np.abs(pixels_of(convert(data)) - four_corners()).mean() < 4
    assert pixels_of(convert(data, max_side=48)).shape == (32, 48, 3)
    square = pixels_of(convert(data, size=32))
    assert np.abs(square[4, 4] - RED).max() < 20 and np.abs(square[4, 28] - GREEN).max() < 20


@needs_robustness
def test_photographs_of_every_orientation_come_out_alike() -> None:
    files = [ROBUSTNESS / f"exif-orientation/Landscape_{orientation}.jpg" for orientation in range(1, 9)]
    small = [pixels_of(convert(file.read_bytes(), size=64)) for file in files]
    for other in small[1:]:
        assert np.abs(other - small[0]).mean() < 6


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"comment": b"a comment"}])
def test_an_rgb_jpeg_that_needs_no_change_is_kept_byte_for_byte(options: dict[str, object]) -> None:
    data = encode(four_corners(), **options)
    assert convert(data) == data
    assert convert(data, max_side=96) == data
    square = encode(four_corners()[:, :64], **options)
    assert convert(square, size=64) == square


def test_jpegs_that_decoders_read_differently_are_encoded_anew() -> None:
    plain = encode(four_corners())
    for data in (
        encode(Image.fromarray(four_corners()).convert("L")),
        encode(Image.fromarray(four_corners()).convert("CMYK")),
        encode(four_corners(), keep_rgb=True),
        plain[:2] + b"\xff\x00" + plain[2:],  # stray bytes between marker segments
    ):
        converted = convert(data)
        assert converted != data and pixels_of(converted).shape == (64, 96, 3)


def test_a_square_size_is_what_every_image_gets() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert pixels_of(convert(encode(four_corners(), kind), size=40)).shape == (40, 40, 3)


def test_a_largest_side_shrinks_and_never_enlarges() -> None:
    data = encode(four_corners(), "PNG")
    assert pixels_of(convert(data, max_side=48)).shape == (32, 48, 3)
    assert pixels_of(convert(data, max_side=1000)).shape == (64, 96, 3)
    thin = encode(np.zeros((500, 2, 3), np.uint8), "PNG")
    assert pixels_of(convert(thin, max_side=50)).shape == (50, 1, 3)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    levels = np.repeat(np.array([0, 64, 128, 200, 255]), 16).astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        data = encode(Image.fromarray(np.tile(levels, (16, 1))), kind)
        middle = pixels_of(convert(data, quality=100))[8, 8::16, 0]
        assert np.abs(middle - [0, 64, 128, 200, 255]).max() <= 2


def test_transparency_is_laid_on_white() -> None:
    half = np.zeros((32, 32, 4), np.uint8)
    half[:, :16] = (255, 0, 0, 255)
    half[:, 16:] = (0, 0, 0, 0)
    rgba = Image.fromarray(half)
    palette = rgba.convert("RGB").quantize(2)
    black = palette.getpixel((20, 5))
    for data in (encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True), encode(palette, "PNG", transparency=black)):
        pixels = pixels_of(convert(data))
        assert np.abs(pixels[16, 4] - RED).max() < 8 and np.abs(pixels[16, 28] - WHITE).max() < 8


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels_of(convert(data))[16, 16] - RED).max() < 8


def test_what_cannot_be_used_is_refused_by_reason() -> None:
    header = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    cases = {
        "truncated": encode(noise)[:-900],
        "not an image": b"<html>404 not found</html>",
        "empty file": b"",
        "decompression bomb": header + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""),
        "unsupported pixels": encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
        "cannot convert": encode(Image.new("1", (66_000, 1)), "PNG"),
    }
    for reason, data in cases.items():
        with pytest.raises(BadImage) as raised:
            convert(data)
        assert raised.value.reason == reason and raised.value.detail


def test_no_program_is_started_for_postscript() -> None:
    with pytest.raises(BadImage, match="not an image"):
        convert(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
