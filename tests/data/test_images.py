"""One image, one meaning: build, adopt, verify, training, evaluation and prediction take the same files and see the
same pixels of them."""

from __future__ import annotations

import io
import json
import logging
import random
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dist_train.config import DataConfig
from dist_train.data.augment import draw_augmentation
from dist_train.data.images import BadImage, decode, read_header
from dist_train.data.loader import EvalLoader, TrainLoader
from dist_train.data.manifest import read_manifest
from dist_train.data.reader import ImageReader
from dist_train.place import Place
from shards.__main__ import main
from shards.images import convert
from shards.verify import verify_shard_set
from tests.conftest import smooth_image, write_raw_set, write_tar

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


# ---------------------------------------------------------------------- every odd file there is


@dataclass(frozen=True)
class Verdicts:
    """The files, and what each says of them, by their places: what it sees, or only that it takes them."""

    paths: list[str]
    images: list[bytes]
    built: dict[int, NDArray[np.float32]]
    adopted: set[int]
    verified: set[int]
    trained: dict[int, tuple[NDArray[np.float32], tuple[int, int]]]
    evaluated: dict[int, NDArray[np.float32]]
    predicted: dict[int, NDArray[np.float32]]


@pytest.fixture(scope="module")
def verdicts(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """All of them, asked about every file of robustness/ and odd/, licences and lists included."""
    files = [path for name in ("robustness", "odd") for path in sorted((shared_data / name).rglob("*"))]
    paths = [str(path.relative_to(shared_data)) for path in files if path.is_file()]
    images = [(shared_data / path).read_bytes() for path in paths]
    root = tmp_path_factory.mktemp("verdicts")

    # Built with a class for each file, so that the class tells which file a sample was.
    csv, built = root / "files.csv", root / "built"
    csv.write_text("path,class,split\n" + "".join(f"{path},{i},train\n" for i, path in enumerate(paths)))
    assert main(["build", str(csv), str(built), "--root", str(shared_data), "--workers", "2"]) == 0
    left_out = {json.loads(line)["name"] for line in (built / "left_out.jsonl").read_text().splitlines()}
    places, manifest = {}, read_manifest(built)  # whose classes are those of the files that were taken
    for batch in EvalLoader(data_config(built), manifest, "train", Place(), batch_size=64):
        assert batch.weights.all()
        taken = [int(manifest.class_names[label]) for label in batch.labels]
        places |= zip(batch.samples.tolist(), taken, strict=True)
    assert {paths[i] for i in places.values()} == set(paths) - left_out

    adopted = root / "adopted"
    adopted.mkdir()
    write_tar(adopted / "train-0.tar", [{"jpg": image, "cls": b"0"} for image in images])
    assert main(["adopt", str(adopted), "--workers", "1"]) == 0
    listed = {json.loads(line)["name"] for line in (adopted / "left_out.jsonl").read_text().splitlines()}
    differences = verify_shard_set(adopted)
    assert all("its image does not decode" in line for line in differences)
    refused = {int(line.partition("sample ")[2][:6]) for line in differences}
    return Verdicts(
        paths,
        images,
        built={places[sample]: seen for sample, seen in evaluated(built).items()},
        adopted={i for i in range(len(paths)) if f"train-0.tar:{i:06d}" not in listed},
        verified=set(range(len(paths))) - refused,
        trained=trained(adopted),
        evaluated=evaluated(adopted),
        predicted=predicted(adopted, images),
    )


def test_all_take_the_same_of_all_odd_files(verdicts: Verdicts) -> None:
    taken = set(verdicts.predicted)
    for name in ("built", "adopted", "verified", "trained", "evaluated"):
        other = set(getattr(verdicts, name))
        assert {verdicts.paths[i] for i in other ^ taken} == set(), f"{name} and predict differ"  # none has an excuse
    assert len(taken) > 500
    named = {Path(verdicts.paths[i]).name for i in taken}
    odd = {Path(path).name for path in verdicts.paths if path.startswith("odd/")}
    assert odd <= named  # each of them has whole pixels


def test_all_see_the_same_pixels_of_all_odd_files(verdicts: Verdicts) -> None:
    for i, seen in verdicts.predicted.items():
        path, image = verdicts.paths[i], decode(verdicts.images[i])
        assert np.abs(seen - resized(image, SIDE)).max() <= ROUNDING, path
        assert (verdicts.evaluated[i] == seen).all(), path
        in_training, (y, x) = verdicts.trained[i]
        cut = resized(image, SIDE + MARGIN)[y : y + SIDE, x : x + SIDE]
        assert np.abs(in_training - cut).max() <= ROUNDING, path
        # Build keeps a file, or encodes these very pixels as a JPEG.
        both = [resized(image, SIDE), resized(Image.open(io.BytesIO(encode(image, "JPEG", quality=92))), SIDE)]
        assert min(np.abs(verdicts.built[i] - one).max() for one in both) <= ROUNDING, path


# ---------------------------------------------------------------------- transparency, orientation, metadata


def test_icons_that_differ_in_transparency_alone_are_told_apart_everywhere(shared_data: Path, tmp_path: Path) -> None:
    disc, bar = ((shared_data / "odd" / f"alpha_{name}.png").read_bytes() for name in ("disc", "bar"))
    expected = [resized(decode(data), SIDE) for data in (disc, bar)]
    assert np.abs(expected[0] - expected[1]).mean() > 20  # of 255
    source = tmp_path / "source" / "icons"
    source.mkdir(parents=True)
    (source / "bar.png").write_bytes(bar)
    (source / "disc.png").write_bytes(disc)
    build = ["build", str(source.parent), str(tmp_path / "built"), "--ratios", "1,0,0", "--workers", "1"]
    assert main(build) == 0
    (tmp_path / "adopted").mkdir()
    write_tar(tmp_path / "adopted" / "train-0.tar", [{"png": data, "cls": b"0"} for data in (disc, bar)])
    assert main(["adopt", str(tmp_path / "adopted"), "--workers", "1"]) == 0
    for root, loss in ((tmp_path / "built", 30), (tmp_path / "adopted", ROUNDING)):  # JPEG blurs the sharp edges
        seen = list(evaluated(root).values())
        in_order = seen if np.abs(seen[0] - expected[0]).mean() < np.abs(seen[1] - expected[0]).mean() else seen[::-1]
        for one, wanted in zip(in_order, expected, strict=True):
            assert np.abs(one - wanted).max() <= loss
    for one, wanted in zip(predicted(tmp_path, [disc, bar]).values(), expected, strict=True):
        assert np.abs(one - wanted).max() <= ROUNDING
    for place, (one, (y, x)) in trained(tmp_path / "adopted").items():
        wanted = resized(decode((disc, bar)[place]), SIDE + MARGIN)[y : y + SIDE, x : x + SIDE]
        assert np.abs(one - wanted).max() <= ROUNDING


def test_the_content_decides_whatever_the_ending_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = smooth_image(3, 40, 32)
    kinds = {"gif": "GIF", "bmp": "BMP", "tif": "TIFF", "jp2": "JPEG2000", "avif": "AVIF", "jpg": "PNG", "png": "GIF"}
    kinds = {ending: kind for ending, kind in kinds.items() if kind in Image.SAVE}
    folder = tmp_path / "tars"
    folder.mkdir()
    options = {"JPEG2000": {"irreversible": False}, "AVIF": {"quality": 100}}
    files = {ending: encode(picture, kind, **options.get(kind, {})) for ending, kind in kinds.items()}
    write_tar(folder / "train-0.tar", [{ending: data, "cls": b"0"} for ending, data in files.items()])
    assert main(["adopt", str(folder), "--workers", "1"]) == 0
    with caplog.at_level(logging.INFO):
        seen = evaluated(folder)
    told = [record.getMessage() for record in caplog.records if "converted each time" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("train-0.tar:000000 ")
    assert len(seen) == len(kinds) and len(trained(folder)) == len(kinds)
    for (kind, image), one in zip(
        zip(kinds.values(), seen.values(), strict=True), predicted(folder, list(files.values())).values(), strict=True
    ):
        assert (image == one).all()
        loss = 12 if kind in ("GIF", "AVIF") else 1
        assert np.abs(image - resized(picture, SIDE)).mean() <= loss, kind


MODES = {
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16"),
    "WEBP": ("L", "RGB", "RGBA", "P"),
    "lossless WEBP": ("RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
WITH_EXIF = ("JPEG", "PNG", "WEBP", "lossless WEBP", "TIFF", "AVIF")


def upright_picture(mode: str) -> tuple[Image.Image, NDArray[np.float32]]:
    """A picture of 40 x 32 pixels in a mode, and its colours on white, computed by hand."""
    rgb = np.asarray(smooth_image(5, 40, 32)).copy()
    grey = mode in ("1", "L", "LA", "I;16")
    if grey:
        rgb[:] = np.asarray(Image.fromarray(rgb).convert("L"))[:, :, None]
    if mode == "1":
        rgb[:] = np.where(np.arange(40) % 40 < 20, 0, 255)[None, :, None]
    alpha = np.full((32, 40), 255, np.uint8)
    if mode in ("LA", "RGBA", "PA"):
        alpha[8:20, 5:25] = 0
    on_white = rgb * (alpha[:, :, None] / 255) + 255 - alpha[:, :, None]
    if mode in ("LA", "RGBA"):
        whole = Image.fromarray(np.dstack([rgb, alpha]))
        return (whole.convert("LA") if mode == "LA" else whole), on_white
    if mode == "I;16":
        return Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257), on_white
    if mode == "PA":
        palette = Image.fromarray(rgb).quantize(255)
        index = np.where(alpha == 0, 255, np.asarray(palette)).astype(np.uint8)
        image = Image.fromarray(index, "P")
        image.putpalette([*palette.getpalette()[: 255 * 3], 1, 2, 3])
        image.info["transparency"] = 255
        return image, on_white
    if mode == "P":
        return Image.fromarray(rgb).quantize(256), on_white
    return Image.fromarray(rgb).convert(mode), on_white


def stored(upright: Image.Image, orientation: int) -> Image.Image:
    """The stored pixels of an upright image (EXIF 2.32, 4.6.4.A)."""
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Transpose: the inverses of what turns it upright
    return upright.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else upright


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, modes in MODES.items() for mode in modes])
def test_every_mode_format_and_orientation_is_seen_as_it_was_drawn(kind: str, mode: str) -> None:
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    image, upright = upright_picture(mode)
    options = {"lossless": True} if kind.startswith("lossless") else {}
    if kind == "TIFF":
        options["compression"] = "tiff_lzw"
    coarse = mode in ("P", "PA", "CMYK", "YCbCr") or kind in ("JPEG", "WEBP", "AVIF", "GIF")
    for orientation in range(1, 9) if kind in WITH_EXIF else (1,):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = stored(image, orientation)
        turned.info.update(image.info)
        with_exif = {"exif": exif.tobytes()} if kind in WITH_EXIF else {}
        if kind == "TIFF":
            with_exif = {"tiffinfo": {0x0112: orientation}}
        data = encode(turned, kind.split()[-1], **options, **with_exif)
        wanted = resized(Image.fromarray(np.round(upright).astype(np.uint8)), SIDE)
        (seen,) = predicted(Path(), [data]).values()
        assert np.abs(seen - wanted).mean() <= (12 if coarse else 1), orientation
        built = np.asarray(decode(convert(data)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(np.float32)
        assert np.abs(built - seen).mean() <= 6, orientation


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


@pytest.mark.parametrize("value", [b'tiff:Orientation="6"', b"<tiff:Orientation>6</tiff:Orientation>"])
def test_an_orientation_in_xmp_turns_the_image_everywhere(value: bytes, tmp_path: Path) -> None:
    packet = b"<x:xmpmeta>" + value + b"</x:xmpmeta>"
    stored_pixels = smooth_image(3, 40, 32)
    wanted = resized(stored_pixels.transpose(Image.Transpose.ROTATE_270), SIDE)
    for data in (
        jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)),
        png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)),
        encode(stored_pixels, "WEBP", lossless=True, xmp=packet),
    ):
        assert np.abs(predicted(tmp_path, [data])[0] - wanted).max() <= 8
        assert np.abs(resized(decode(convert(data)), SIDE) - wanted).mean() <= 4


def test_both_ways_to_write_exif_into_a_webp_turn_it(shared_data: Path, tmp_path: Path) -> None:
    names = ("exif_orientation6.webp", "exif_prefix_orientation6.webp", "lossless_exif6.webp")
    files = [(shared_data / "odd" / name).read_bytes() for name in names]
    seen = predicted(tmp_path, files)
    assert (seen[0] == seen[1]).all()
    root = write_raw_set(tmp_path / "set", files)
    assert all((seen[i] == image).all() for i, image in evaluated(root).items()) and len(trained(root)) == 3


# ---------------------------------------------------------------------- damage to pixels


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


@given(st.data())
def test_no_damage_makes_looking_at_a_header_fail(data: st.DataObject) -> None:
    kind, options = data.draw(st.sampled_from([("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]))
    exif = Image.Exif()
    exif[0x0112] = 1
    spoilt = bytearray(encode(smooth_image(1, 16, 16), kind, exif=exif.tobytes(), **options))
    for at in data.draw(st.lists(st.integers(0, min(len(spoilt), 200) - 1), max_size=4)):
        spoilt[at] = data.draw(st.integers(0, 255))
    read_header(bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))]))
