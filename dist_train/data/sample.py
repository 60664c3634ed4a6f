"""What is checked of a sample before it is used, and where its image, class and tags lie in its shard.

Whether the tar has the members where the list of its samples says, whether they are what the checksum says, whether the
class is one, and what the image announces.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from nvidia.nvimgcodec import CodeStream

from dist_train.data.checksums import checksums_path, sample_checksum
from dist_train.data.images import Header, check_pixels, read_header
from dist_train.data.shard import Shard
from dist_train.data.tags import tag_line
from dist_train.data.tarindex import Member, TarSample

_HEADER = 512  # bytes of a tar header


class BadSample(Exception):
    """Why a sample cannot be used."""


class NotWhereListed(BadSample):
    """The tar does not hold what the list of its samples says."""


class Kind(IntEnum):
    """Whether DALI may have an image as it is, or it has to be converted first; 0 is for those not looked at."""

    PLAIN = 1
    ODD = 2


class Found(NamedTuple):
    """A sample of a shard whose members are where they should be: its image, class id and line of tags ("" if none)."""

    sample: TarSample
    image: Member
    label: int
    tags: str


def find_sample(shard: Shard, place: int, num_classes: int, with_tags: bool) -> Found:
    """The sample at `place` of a shard. Raises BadSample."""
    if place >= len(shard.samples):
        raise NotWhereListed(f"not in the shard, which holds only {len(shard.samples)} samples")
    sample = shard.samples[place]
    image, label = sample.image(), sample.find("cls")
    if image is None:
        raise NotWhereListed(f"has no image, or several (members: {', '.join(sample.members) or 'none'})")
    if label is None:
        raise NotWhereListed("has no .cls")
    tags = sample.find("txt") if with_tags else None
    for found in (image, label, tags):
        if found is not None:
            _check_tar_header(shard, sample.key, *found)
    start, size = label[1]
    digits = shard.tar[start : start + min(size, 40)].strip()
    if not digits.isdigit() or int(digits) >= num_classes:
        raise BadSample(f"its class is {digits!r}, not a number below {num_classes}")
    text = "" if tags is None else tag_line(_read(shard, tags[1]).decode("utf-8", "replace"))
    return Found(sample, image[1], int(digits), text)


def check_image(shard: Shard, place: int, found: Found, max_pixels: int, baked: int | None) -> Kind:
    """What kind of image a sample has; baked: side of the square that it must be. Raises BadSample, BadImage."""
    if shard.checksums is not None and sample_checksum(shard.tar, found.sample) != shard.checksums[place]:
        raise BadSample(f"damaged: it is not what {checksums_path(shard.path).name} says")
    size = plain_size(_read(shard, found.image), max_pixels)
    if size is None:
        return Kind.ODD
    check_size(*size, baked)
    return Kind.PLAIN


def size_of_plain(shard: Shard, found: Found) -> tuple[int, int]:
    """(height, width) of an image that `check_image` has found plain; it is upright."""
    stream = CodeStream(_read(shard, found.image))
    return stream.height, stream.width


def plain_size(encoded: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(width, height) of an image that DALI may have as it is, by its header alone; None for one to be converted.

    A header that DALI's own parser refuses is not plain either: when several threads share a batch with such an image,
    DALI 2.4 reads freed memory and often crashes. Raises BadImage for too many pixels.
    """
    header = read_header(encoded)
    if header is not None:
        check_pixels(header.width, header.height, max_pixels)
        if header.plain and _is_taken_by_dali(encoded, header):
            return header.width, header.height
    return None


def check_size(width: int, height: int, baked: int | None) -> None:
    """Raise BadSample for an image that is not the square of `baked` pixels that the manifest speaks of."""
    if baked and (width, height) != (baked, baked):
        raise BadSample(f"{width} x {height} pixels, but the manifest says that all were resized to {baked}x{baked}")


def _check_tar_header(shard: Shard, key: str, extension: str, member: Member) -> None:
    """Look at the tar header before a member: a wrong index must not give wrong samples. Raises NotWhereListed."""
    header = shard.tar[max(member.offset - _HEADER, 0) : max(member.offset, 0)]
    if len(header) != _HEADER or header[257:262] != b"ustar" or _octal(header[124:136]) != member.size:
        raise NotWhereListed(f"the tar has no .{extension} at offset {member.offset}: a damaged header, or a cut tar")
    if member.offset + member.size > len(shard.tar):
        raise NotWhereListed(f"its .{extension} is cut short")
    start = key.encode(errors="surrogateescape") + b"."
    if shard.from_tar or not key or header.startswith(start):
        return
    # Only short plain names stand in this header as they are; others are in the extended headers before it.
    if key.isascii() and len(start) + len(extension) <= 100 and not header[345:500].rstrip(b"\0"):
        raise NotWhereListed(f"the tar has another file than {key}.{extension} at offset {member.offset}")


def _is_taken_by_dali(encoded: bytes, header: Header) -> bool:
    try:
        stream = CodeStream(encoded)
        return (stream.codec_name, stream.width, stream.height) == header[:3]
    except RuntimeError:
        return False


def _octal(digits: bytes) -> int:
    try:
        return int(digits.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _read(shard: Shard, member: Member) -> bytes:
    return shard.tar[member.offset : member.offset + member.size]
