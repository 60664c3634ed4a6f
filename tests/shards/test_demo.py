"""The demo data set: deterministic, long-tailed, told apart by shapes, tagged incompletely."""

from __future__ import annotations

import io
import pickle
from collections import defaultdict
from dataclasses import astuple, fields

import numpy as np
import pytest
from PIL import Image

from dist_train.errors import UseError
from shards.demo import records as demo
from shards.demo.drawing import BACKGROUNDS, OCCLUSIONS
from shards.demo.figure import ACCESSORIES, CLOTHES, EYES, FACES, FRINGES, HAIR, MOUTHS

SHAPES = ("hair", "fringe", "eyes", "face", "clothes", "accessory")
COLOURS = ("hair_colour", "eye_colour", "clothes_colour", "trim_colour", "skin")


def _differences(first: demo.Character, second: demo.Character, names: tuple[str, ...]) -> int:
    return sum(getattr(first, name) != getattr(second, name) for name in names)


def test_the_same_seed_gives_the_same_records_and_bytes() -> None:
    first, second = (demo.demo_records(characters=6, pictures=120, size=48, seed=3) for _ in range(2))
    assert [(r.name, r.class_name, r.split, r.tags) for r in first] == [
        (r.name, r.class_name, r.split, r.tags) for r in second
    ]
    for one, other in list(zip(first, second, strict=True))[::20]:
        assert one.read() == one.read() == other.read()


def test_a_record_draws_the_same_picture_after_pickling() -> None:
    record = demo.demo_records(characters=2, pictures=42, size=48)[-1]
    assert pickle.loads(pickle.dumps(record)).read() == record.read()


def test_another_seed_gives_another_cast_and_other_pictures() -> None:
    assert not set(demo.cast(40, 0)) & set(demo.cast(40, 1))
    assert not set(demo.class_names(40, 0)) & set(demo.class_names(40, 1))
    first, second = (demo.demo_records(characters=2, pictures=42, size=48, seed=seed)[0] for seed in (0, 1))
    assert first.read() != second.read()


def test_pictures_of_one_character_all_differ() -> None:
    records = demo.demo_records(characters=2, pictures=42, size=32)
    assert len({record.read() for record in records}) == 42


@pytest.mark.parametrize("size", [16, 96, 160])
def test_a_picture_is_a_jpeg_of_the_requested_size(size: int) -> None:
    picture = Image.open(io.BytesIO(demo.demo_records(characters=2, pictures=42, size=size)[5].read()))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (size, size))


def test_every_background_occlusion_and_value_of_an_attribute_can_be_drawn() -> None:
    characters = demo.cast(150, 0)
    seen: dict[str, set[object]] = defaultdict(set)
    for class_id, character in enumerate(characters):
        pose, scene = demo._variation(0, class_id, 0)
        seen["background"].add(scene.background)
        seen["occlusion"].add(scene.occlusion)
        seen["mouth"].add(pose.mouth)
        for field in fields(character):
            seen[field.name].add(getattr(character, field.name))
        assert demo.read_picture(character, 0, class_id, 0, 32)
    expected = (BACKGROUNDS, OCCLUSIONS, MOUTHS, HAIR, FRINGES, EYES, FACES, CLOTHES, ACCESSORIES)
    for name, values in zip(("background", "occlusion", "mouth", *SHAPES), expected, strict=True):
        assert seen[name] == set(values), name


@pytest.mark.parametrize(("characters", "pictures"), [(40, 8000), (10, 300), (2, 42), (200, 30_001)])
def test_class_counts_sum_to_the_pictures_and_fall_twenty_to_one(characters: int, pictures: int) -> None:
    counts = demo.class_counts(characters, pictures)
    assert len(counts) == characters
    assert sum(counts) == pictures
    assert counts == sorted(counts, reverse=True)
    assert (counts[0] - 1) / (counts[-1] + 1) < 20 < (counts[0] + 1) / (counts[-1] - 1)


def test_the_default_has_forty_pictures_of_the_rarest_character() -> None:
    assert min(demo.class_counts(40, 8000)) >= 40


def test_the_records_follow_the_class_counts() -> None:
    records = demo.demo_records(characters=7, pictures=500, size=32)
    counted: dict[str, int] = defaultdict(int)
    for record in records:
        counted[record.class_name] += 1
    assert list(counted.values()) == demo.class_counts(7, 500)
    assert len({record.name for record in records}) == 500


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("count", "least"), [(40, 4), (150, 2)])
def test_every_two_characters_differ_in_shapes(seed: int, count: int, least: int) -> None:
    characters = demo.cast(count, seed)
    for i, first in enumerate(characters):
        assert all(_differences(first, second, SHAPES) >= least for second in characters[:i])


def test_characters_of_neighbouring_counts_share_all_colours() -> None:
    characters = demo.cast(40, 0)
    looks = [tuple(getattr(character, name) for name in COLOURS) for character in characters]
    for start in range(0, 40, demo.CHARACTERS_PER_COLOURS):
        assert len(set(looks[start : start + demo.CHARACTERS_PER_COLOURS])) == 1
    assert len(set(looks)) == 40 // demo.CHARACTERS_PER_COLOURS


def test_one_who_knows_every_colour_names_less_than_a_third() -> None:
    best = defaultdict(int)
    for character, count in zip(demo.cast(40, 0), demo.class_counts(40, 8000), strict=True):
        colours = tuple(getattr(character, name) for name in COLOURS)
        best[colours] = max(best[colours], count)
    assert sum(best.values()) < 8000 / 3


def test_tags_never_name_the_class() -> None:
    records = demo.demo_records(characters=40, pictures=2000, size=32)
    for record in records:
        assert not any(word in record.tags for word in (record.class_name, *record.class_name.split("_")))


def test_tags_are_lower_case_words_in_alphabetical_order() -> None:
    for record in demo.demo_records(characters=10, pictures=500, size=32):
        words = record.tags.split(" ")
        assert words == sorted(set(words))
        assert record.tags == record.tags.lower()
        assert "none" not in words
        assert "\n" not in record.tags


def test_tags_are_as_many_as_promised() -> None:
    lengths = [len(record.tags.split()) for record in demo.demo_records()]
    assert 8 < np.mean(lengths) < 14


def test_tags_leave_out_three_in_ten_and_five_in_a_hundred_are_wrong() -> None:
    """Measured on the clothes, whose tags have no other source."""
    character = demo.cast(1, 0)[0]
    words = [set(demo.picture_tags(character, 0, 0, number).split()) & set(CLOTHES) for number in range(4000)]
    named = [word for found in words for word in found]
    assert len(named) / 4000 == pytest.approx(0.7, abs=0.04)
    assert np.mean([word != character.clothes for word in named]) == pytest.approx(0.05, abs=0.015)


def test_closed_eyes_are_not_described() -> None:
    character = demo.cast(1, 0)[0]
    closed = [n for n in range(600) if demo._variation(0, 0, n)[0].eyes_closed]
    assert closed
    for number in closed:
        words = demo.picture_tags(character, 0, 0, number).split()
        assert not any(word in EYES or (word.endswith("_eyes") and word != "closed_eyes") for word in words)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"characters": 1}, "2 characters"),
        ({"pictures": 30}, "30 pictures"),
        ({"seed": -1}, "seed"),
        ({"size": 8}, "8 pixels"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(UseError, match=named):
        demo.demo_records(**arguments)


def test_a_cast_too_large_to_tell_apart_is_refused() -> None:
    with pytest.raises(UseError, match="fewer"):
        demo.cast(501, 0)


def test_characters_hash_by_value() -> None:
    assert len({astuple(character) for character in demo.cast(200, 0)}) == 200
