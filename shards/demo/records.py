"""The embedded demo data set: made-up cartoon characters drawn by code, with tags and a long tail of class counts.

The seed decides the cast: other seeds give other characters, so that one can pretrain on one cast and fine-tune on
another. Every five characters, in order of their counts, share all their colours and differ in shapes only: whoever
reads nothing but colour can at best name the most frequent of the five.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from dist_train.data.draws import uniform
from dist_train.errors import UseError
from shards.demo import figure
from shards.demo.drawing import BACKGROUNDS, OCCLUSIONS, Scene, draw_picture
from shards.demo.figure import Character, Pose
from shards.demo.pen import BLACK, Colour, mix
from shards.records import Record

Choice = TypeVar("Choice")

LARGEST_TO_SMALLEST = 20
"""How many times as many pictures the most frequent character has as the rarest."""
CHARACTERS_PER_COLOURS = 5
"""Characters that share one set of colours."""
MOST_CHARACTERS = 500
"""Characters that one cast can have."""
TAG_KEPT = 0.7
"""Probability that something visible is tagged."""
TAG_WRONG = 0.05
"""Probability that a tag of the character's look names another value instead."""

# First counter after the seed: which numbers are drawn.
_COLOURS, _SHAPES, _NAMES, _PICTURES, _TAGS = range(5)

_SHAPE_CHOICES = (figure.HAIR, figure.FRINGES, figure.EYES, figure.FACES, figure.CLOTHES, figure.ACCESSORIES)
_COLOUR_CHOICES = (
    figure.HAIR_COLOURS,
    figure.EYE_COLOURS,
    figure.CLOTHES_COLOURS,
    figure.TRIM_COLOURS,
    figure.SKIN_COLOURS,
)
# Backgrounds are painted in the characters' own colours, so that how often a colour occurs says little of who it is.
_PALETTE = [colour for colours in _COLOUR_CHOICES for colour in colours.values()]
_SYLLABLES = "ka ki ko sa shi su se ta chi to na ni no ha hi mi mo ma ya yu ra ri re ro wa".split()


def demo_records(characters: int = 40, pictures: int = 8000, size: int = 96, seed: int = 0) -> list[Record]:
    """The records of the demo data set, class by class; each draws its picture (size x size, JPEG) when it is read.

    The same arguments give the same records and, with one version of Pillow, the same bytes.

    Raises UseError if an argument is out of range.
    """
    if seed < 0:
        raise UseError(f"the seed of the demo is {seed}; it must be 0 or more")
    if size < 16:
        raise UseError(f"demo pictures of {size} pixels are too small to show anything; ask for 16 or more")
    counts = class_counts(characters, pictures)
    names = class_names(characters, seed)
    return [
        Record(
            name=f"demo/{names[class_id]}/{number:05d}.jpg",
            read=functools.partial(read_picture, character, seed, class_id, number, size),
            class_name=names[class_id],
            tags=picture_tags(character, seed, class_id, number),
        )
        for class_id, character in enumerate(cast(characters, seed))
        for number in range(counts[class_id])
    ]


def class_counts(characters: int, pictures: int) -> list[int]:
    """Pictures of each class, most frequent first: a power law from 20 to 1 that sums to `pictures`.

    Raises UseError if there are fewer than two characters or too few pictures to give each one.
    """
    if characters < 2:
        raise UseError(f"the demo needs at least 2 characters, not {characters}")
    exponent = np.log(LARGEST_TO_SMALLEST) / np.log(characters)
    weights = np.arange(1, characters + 1) ** -exponent
    exact = pictures * weights / weights.sum()
    counts = np.floor(exact).astype(int)
    largest_remainders = np.argsort(counts - exact, kind="stable")[: pictures - counts.sum()]
    counts[largest_remainders] += 1
    if counts.min() < 1:
        needed = int(np.ceil(weights.sum() / weights.min()))
        raise UseError(f"{pictures} pictures are too few for {characters} characters; ask for at least {needed}")
    return counts.tolist()


def class_names(characters: int, seed: int) -> list[str]:
    """Made-up names, all different: two words of syllables joined by an underscore."""
    names: dict[str, None] = {}
    draw = 0
    while len(names) < characters:
        syllables = [_pick(_SYLLABLES, u) for u in uniform(seed, _NAMES, draw, np.arange(5))]
        names["".join(syllables[:3]) + "_" + "".join(syllables[3:])] = None
        draw += 1
    return list(names)


def cast(characters: int, seed: int) -> list[Character]:
    """The characters, most frequent first. No two sets of colours are the same. Every two characters differ in at
    least four of the six shapes as long as such can be found (that is for the default 40), then in as many as can be
    had, down to two for a cast of 500.

    Raises UseError if more than MOST_CHARACTERS are asked for.
    """
    if characters > MOST_CHARACTERS:
        raise UseError(f"{characters} demo characters are too many to tell apart; ask for {MOST_CHARACTERS} or fewer")
    colour_sets: dict[tuple[str, ...], None] = {}
    draw = 0
    while len(colour_sets) * CHARACTERS_PER_COLOURS < characters:
        numbers = uniform(seed, _COLOURS, draw, np.arange(len(_COLOUR_CHOICES)))
        colour_sets[tuple(_pick([*names], u) for names, u in zip(_COLOUR_CHOICES, numbers, strict=True))] = None
        draw += 1
    colours = list(colour_sets)

    sizes = np.array([len(choices) for choices in _SHAPE_CHOICES])
    shapes = np.zeros((0, len(sizes)), int)
    for class_id in range(characters):
        numbers = uniform(seed, _SHAPES, class_id, np.arange(500)[:, None], np.arange(len(sizes)))
        candidates = (numbers * sizes).astype(int)
        differences = (candidates[:, None, :] != shapes).sum(2).min(1, initial=len(sizes))
        first = np.flatnonzero(differences >= min(4, differences.max()))[0]
        shapes = np.concatenate([shapes, candidates[first : first + 1]])

    return [
        Character(
            *colours[class_id // CHARACTERS_PER_COLOURS],
            *(choices[i] for choices, i in zip(_SHAPE_CHOICES, shape, strict=True)),
        )
        for class_id, shape in enumerate(shapes)
    ]


def read_picture(character: Character, seed: int, class_id: int, number: int, size: int) -> bytes:
    """Draw picture `number` of a character; size in pixels. Returns JPEG bytes."""
    pose, scene = _variation(seed, class_id, number)
    return draw_picture(character, pose, scene, size)


# ---- what varies from picture to picture -----------------------------------------------------------------------------


def _pick(choices: Sequence[Choice], u: float, weights: tuple[float, ...] = ()) -> Choice:
    """The choice that the uniform number u falls on; equal weights unless told otherwise."""
    if weights:
        return choices[int(np.searchsorted(np.cumsum(weights), u * sum(weights), side="right"))]
    return choices[int(u * len(choices))]


def _variation(seed: int, class_id: int, number: int) -> tuple[Pose, Scene]:
    """Pose and scene of one picture, from its own numbers."""
    draws = uniform(seed, _PICTURES, class_id, number, np.arange(100)).tolist()
    noise = tuple(draws[:64])
    unit = iter(draws[64:])

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(unit)

    def background_colour() -> Colour:
        """A colour between two of the characters' colours, nearer to the first."""
        return mix(_pick(_PALETTE, next(unit)), _pick(_PALETTE, next(unit)), 0.4 * next(unit))

    def gain() -> float:
        return brightness * between(0.8, 1.2)

    pose = Pose(
        x=between(-0.08, 0.08),
        y=between(-0.12, 0.04),
        scale=between(0.95, 1.2),
        rotate=between(-0.14, 0.14),
        mirror=next(unit) < 0.5,
        tilt=between(-0.10, 0.10),
        turn=between(-1, 1),
        nod=between(-1, 1),
        mouth=_pick(figure.MOUTHS, next(unit)),
        eyes_closed=next(unit) < 0.06,
    )
    brightness = between(0.65, 1.2)
    scene = Scene(
        background=_pick(BACKGROUNDS, next(unit)),
        occlusion=_pick(OCCLUSIONS, next(unit), weights=(0.6, 0.08, 0.08, 0.08, 0.08, 0.08)),
        colours=(background_colour(), background_colour(), background_colour()),
        noise=noise,
        line_colour=mix(BLACK, (120, 60, 50), next(unit)),
        line_width=_pick((0.0, 0.012, 0.02, 0.03), next(unit), weights=(0.1, 0.3, 0.4, 0.2)),
        gain=(gain(), gain(), gain()),
        slope=(between(-0.25, 0.25), between(-0.25, 0.25)),
    )
    return pose, scene


# ---- tags ------------------------------------------------------------------------------------------------------------

_LOOKS = (  # the attribute, the values that it takes, how a value is written as a tag
    ("hair_colour", tuple(figure.HAIR_COLOURS), "{}_hair"),
    ("eye_colour", tuple(figure.EYE_COLOURS), "{}_eyes"),
    ("clothes_colour", tuple(figure.CLOTHES_COLOURS), "{}_clothes"),
    ("hair", figure.HAIR, "{}"),
    ("fringe", figure.FRINGES, "{}"),
    ("eyes", figure.EYES, "{}"),
    ("face", figure.FACES, "{}"),
    ("clothes", figure.CLOTHES, "{}"),
    ("accessory", figure.ACCESSORIES, "{}"),
)
_BACKGROUND_TAGS = {
    "plain": ("simple_background",),
    "gradient": ("gradient_background", "simple_background"),
    "stripes": ("striped_background",),
    "checks": ("checkered_background",),
    "bokeh": ("blurry_background",),
    "sky": ("cloud", "outdoors", "sky"),
    "hills": ("outdoors", "scenery"),
    "night": ("night", "outdoors", "starry_sky"),
    "room": ("indoors", "window"),
    "sunburst": ("sunburst",),
}


def picture_tags(character: Character, seed: int, class_id: int, number: int) -> str:
    """What is seen in a picture, as lower-case words in alphabetical order, joined by spaces.

    Each thing that is visible is named with probability TAG_KEPT; a tag of the character's look is wrong with
    probability TAG_WRONG. The other tags (pose, expression, background) say nothing about who it is.
    """
    pose, scene = _variation(seed, class_id, number)
    draws = iter(uniform(seed, _TAGS, class_id, number, np.arange(60)).tolist())
    tags = set()
    for attribute, values, form in _LOOKS:
        kept, wrong, other = next(draws) < TAG_KEPT, next(draws) < TAG_WRONG, next(draws)
        value = getattr(character, attribute)
        hidden = pose.eyes_closed and attribute in ("eye_colour", "eyes")
        if kept and not hidden and value != "none":
            if wrong:
                value = _pick([v for v in values if v not in (value, "none")], other)
            tags.add(form.format(value))
    tags.update(tag for tag in _other_tags(pose, scene) if next(draws) < TAG_KEPT)
    return " ".join(sorted(tags))


def _other_tags(pose: Pose, scene: Scene) -> list[str]:
    """Everything else that is visible in a picture."""
    tags = ["1girl", "solo", "upper_body", pose.mouth, *_BACKGROUND_TAGS[scene.background]]
    if scene.occlusion != "none":
        tags.append(scene.occlusion)
    if pose.eyes_closed:
        tags.append("closed_eyes")
    if abs(pose.turn) > 0.5:
        tags.append("looking_to_the_side")
    if abs(pose.tilt) > 0.07:
        tags.append("head_tilt")
    if sum(scene.gain) / 3 < 0.75:
        tags.append("dark")
    return tags
