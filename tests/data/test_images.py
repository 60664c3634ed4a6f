"""One image, one meaning: build, adopt, verify, training, evaluation and prediction take the same files and see the
same pixels of them."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dist_train.data.images import decode
from dist_train.data.loader import EvalLoader
from dist_train.data.manifest import read_manifest
from dist_train.place import Place
from shards.__main__ import main
from shards.images import convert
from shards.verify import verify_shard_set
from tests.data.viewing import (
    MARGIN,
    ROUNDING,
    SIDE,
    data_config,
    encode,
    evaluated,
    jpeg_with,
    png_with,
    predicted,
    resized,
    trained,
)
from tests.harness import smooth_image, write_raw_set, write_tar

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
