"""Damage to an image file: what touches no pixel makes no image unusable, and everyone judges the rest alike."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dist_train.data.images import BadImage, decode, read_header
from tests.data.viewing import ROUNDING, SIDE, encode, evaluated, jpeg_with, png_with, predicted, resized, trained
from tests.harness import smooth_image, write_raw_set

HARMLESS = {
    "PNG, text that unpacks to 3 MB": png_with((b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
    "PNG, text with a wrong checksum": png_with((b"tEXt", b"Comment\0hello"), spoil=b"tEXt"),
    "PNG, an unknown chunk": png_with((b"quUx", b"12345")),
    "PNG, damaged EXIF": png_with((b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "PNG, gamma and profile": png_with(
        (b"gAMA", struct.pack(">I", 100_000)), (b"iCCP", b"p\0\0" + zlib.compress(b"?"))
    ),
    "PNG, two bytes short": png_with()[:-2],
    "PNG, without its end": png_with()[:-12],
    "PNG, with something behind it": png_with() + b"tail" * 100,
    "JPEG, Adobe segment cut short": jpeg_with((0xEE, b"Adobe")),
    "JPEG, damaged EXIF": jpeg_with((0xE1, b"Exif\0\0MM\0*\0\0")),
    "JPEG, profile out of order": jpeg_with((0xE2, b"ICC_PROFILE\0\x02\x01???")),
    "JPEG, stray zeros in its header": jpeg_with().replace(b"\xff\xdb", b"\0\0\xff\xdb", 1),
    "JPEG, with another behind it": jpeg_with(tail=jpeg_with()),
    "WebP, with something behind it": encode(smooth_image(3, 40, 32), "WEBP", lossless=True) + b"tail",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_damage_that_touches_no_pixel_makes_no_image_unusable(what: str, tmp_path: Path) -> None:
    (seen,) = predicted(tmp_path, [HARMLESS[what]]).values()
    loss = 8 if what.startswith("JPEG") else ROUNDING
    assert np.abs(seen - resized(smooth_image(3, 40, 32), SIDE)).max() <= loss
    root = write_raw_set(tmp_path / "set", [HARMLESS[what]] * 2)
    assert len(trained(root)) == 2
    assert all((one == seen).all() for one in evaluated(root).values())


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A file with a few bits turned, a run of bytes zeroed or drawn anew, some missing, or its end cut off."""
    spoilt, at, length = bytearray(data), draw.randrange(len(data)), draw.choice((1, 5, 30, 300))
    match draw.randrange(5):
        case 0:
            for _ in range(draw.choice((1, 2, 8))):
                spoilt[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case 1:
            spoilt[at : at + length] = bytes(len(spoilt[at : at + length]))
        case 2:
            spoilt[at : at + length] = draw.randbytes(len(spoilt[at : at + length]))
        case 3:
            del spoilt[at : at + length]
        case 4:
            del spoilt[at:]
    return bytes(spoilt)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_blocks": 2}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_damage_to_a_file_is_judged_alike_by_all(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    draw = random.Random(7)
    original = encode(smooth_image(1, 64, 48), kind, **options)
    files = [damaged(original, draw) for _ in range(150)]
    taken = {}
    for i, data in enumerate(files):
        try:
            taken[i] = resized(decode(data), SIDE)
        except BadImage:
            continue
    root = write_raw_set(tmp_path / "set", files)
    in_evaluation = evaluated(root)
    assert set(in_evaluation) == set(trained(root)) == set(taken)
    for i, image in taken.items():
        assert np.abs(in_evaluation[i] - image).max() <= ROUNDING


@given(
    st.binary(max_size=300), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x40\0\0\0WEBPVP8X"])
)
def test_no_bytes_make_looking_at_a_header_fail(data: bytes, start: bytes) -> None:
    header = read_header(start + data)
    assert header is None or not header.plain or header.width * header.height > 0


def test_a_jpeg_that_announces_hundreds_of_colours_is_only_not_plain() -> None:
    frame = struct.pack(">2sHBHHB", b"\xff\xc0", 908, 8, 32, 40, 44) + b"\1\x11\0" * 300
    header = read_header(jpeg_with().replace(b"\xff\xda", frame + b"\xff\xda", 1))
    assert header is not None and not header.plain


def test_data_max_pixels_is_the_limit_of_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # of which Pillow refuses more than twice as many
    gif = encode(smooth_image(3, 40, 32), "GIF")
    with pytest.raises(BadImage, match=r"decompression bomb: .*data\.max_pixels 400"):
        decode(gif, max_pixels=400)
    assert decode(gif, max_pixels=1280).size in ((40, 32), (32, 40))


@given(st.data())
def test_no_damage_makes_looking_at_a_header_fail(data: st.DataObject) -> None:
    kind, options = data.draw(st.sampled_from([("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]))
    exif = Image.Exif()
    exif[0x0112] = 1
    spoilt = bytearray(encode(smooth_image(1, 16, 16), kind, exif=exif.tobytes(), **options))
    for at in data.draw(st.lists(st.integers(0, min(len(spoilt), 200) - 1), max_size=4)):
        spoilt[at] = data.draw(st.integers(0, 255))
    read_header(bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))]))
