"""A cartoon character from the shoulders up: what it is made of, and how each part is drawn.

A figure's coordinates have the middle of the face at (0, 0), the chin at about (0, 0.40) and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.demo.pen import BLACK, WHITE, Colour, Pen, Points, both_sides, ellipse, mix, polygon, smooth

HAIR_COLOURS: dict[str, Colour] = {
    "black": (56, 50, 66),
    "brown": (140, 88, 58),
    "blonde": (242, 208, 110),
    "pink": (244, 150, 182),
    "blue": (88, 134, 220),
    "silver": (208, 212, 228),
}
EYE_COLOURS: dict[str, Colour] = {
    "blue": (50, 110, 220),
    "green": (40, 160, 90),
    "red": (206, 50, 60),
    "purple": (140, 70, 190),
    "yellow": (226, 168, 30),
    "brown": (126, 76, 46),
}
CLOTHES_COLOURS: dict[str, Colour] = {
    "red": (206, 60, 66),
    "blue": (58, 92, 176),
    "green": (74, 148, 98),
    "white": (240, 238, 234),
    "black": (64, 62, 76),
    "purple": (142, 98, 176),
}
TRIM_COLOURS: dict[str, Colour] = {
    "yellow": (250, 212, 84),
    "red": (226, 70, 84),
    "aqua": (96, 202, 212),
    "orange": (244, 150, 66),
}
SKIN_COLOURS: dict[str, Colour] = {"light": (255, 230, 214), "tan": (238, 194, 160), "dark": (184, 128, 98)}

HAIR = ("short_hair", "long_hair", "twintails", "ponytail", "hair_buns", "spiky_hair", "drill_hair", "curly_hair")
FRINGES = ("blunt_bangs", "parted_bangs", "swept_bangs", "choppy_bangs", "forehead", "hair_over_one_eye")
EYES = ("round_eyes", "tsurime", "tareme", "jitome", "slit_pupils")
FACES = ("none", "glasses", "eyepatch", "blush_stickers", "freckles", "whisker_markings", "bandaid_on_face")
CLOTHES = ("sailor_collar", "striped_shirt", "polka_dot", "hoodie", "necktie", "scarf", "overalls", "kimono")
ACCESSORIES = ("none", "cat_ears", "hair_bow", "witch_hat", "horns", "headphones", "hair_flower", "crown")
MOUTHS = ("smile", "open_mouth", "closed_mouth", "frown", ":3")


@dataclass(frozen=True)
class Character:
    """What is the same in every picture of one character: its colours, and the shapes that it is known by."""

    hair_colour: str
    eye_colour: str
    clothes_colour: str
    trim_colour: str
    skin: str
    hair: str
    fringe: str
    eyes: str
    face: str
    clothes: str
    accessory: str


@dataclass(frozen=True)
class Pose:
    """How a character is seen in one picture: lengths in figure units, angles in radians.

    turn and nod (-1 to 1) move the face within the head; tilt leans the head over the body.
    """

    x: float
    y: float
    scale: float
    rotate: float
    mirror: bool
    tilt: float
    turn: float
    nod: float
    mouth: str
    eyes_closed: bool


def draw_figure(pen: Pen, character: Character, pose: Pose) -> None:
    """Draw the character; the pen's frame has the picture's middle at (0, 0) and its edges at -1 and 1."""
    hair = HAIR_COLOURS[character.hair_colour]
    trim = TRIM_COLOURS[character.trim_colour]
    skin = SKIN_COLOURS[character.skin]

    body = pen.moved(pose.x, pose.y, pose.rotate, pose.scale, pose.mirror)
    neck = body.moved(0.0, 0.42, pose.tilt)
    head = neck.moved(0.0, -0.42)
    face = head.moved(0.06 * pose.turn, 0.04 * pose.nod)
    front = head.moved(0.025 * pose.turn, 0.015 * pose.nod)
    back = head.moved(-0.03 * pose.turn, -0.02 * pose.nod)

    if character.accessory in ("horns", "cat_ears"):
        _draw_accessory(back, character.accessory, hair, trim)
    back.fill_all(_BACK_HAIR[character.hair], mix(hair, BLACK, 0.12))
    for strand in _STRANDS.get(character.hair, ()):
        back.stroke(strand, mix(hair, BLACK, 0.45), 0.022)
    _draw_body(body, character, skin, trim)
    head.fill(_FACE, skin)
    _draw_face(face, character, pose, skin)
    front.fill(_FRONT_HAIR[character.fringe], hair)
    front.fill(_SHINE, mix(hair, WHITE, 0.45), outline=False)
    if character.accessory not in ("horns", "cat_ears"):
        _draw_accessory(front, character.accessory, hair, trim)


# ---- hair ------------------------------------------------------------------------------------------------------------

_FACE = smooth(
    (-0.35, -0.08), (-0.33, 0.12), (-0.23, 0.29), (0.0, 0.41), (0.23, 0.29), (0.33, 0.12), (0.35, -0.08), (0.22, -0.38),
    (-0.22, -0.38),
)  # fmt: skip


def _star(spikes: int, inner: float, outer: float, y: float) -> Points:
    """Spikes all round but for the lowest part, where the neck is."""
    angle = np.radians(np.linspace(140, 400, 2 * spikes + 1))
    radius = np.where(np.arange(2 * spikes + 1) % 2, outer, inner)
    return np.stack([radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _cloud(bumps: int, x: float, y: float, radius: float, bump: float) -> list[Points]:
    angle = np.radians(np.linspace(130, 410, bumps))
    rim = [ellipse(x + radius * np.cos(a), y + radius * np.sin(a), bump, bump) for a in angle]
    return [*rim, ellipse(x, y, radius, radius)]


def _drill(side: int) -> list[Points]:
    widths = (0.15, 0.15, 0.135, 0.115, 0.085)
    return [ellipse(side * (0.47 + 0.01 * i), 0.08 + 0.135 * i, width, 0.105) for i, width in enumerate(widths)]


_BOB = smooth((-0.42, 0.0), (-0.46, 0.25), (-0.40, 0.42), (0.0, 0.36), (0.40, 0.42), (0.46, 0.25), (0.42, 0.0),
              (0.36, -0.38), (0.0, -0.52), (-0.36, -0.38))  # fmt: skip
_SKULL = ellipse(0.0, -0.10, 0.42, 0.42)
_TAIL = smooth((0.30, -0.34), (0.52, -0.44), (0.70, -0.22), (0.72, 0.15), (0.60, 0.62), (0.55, 0.30), (0.44, -0.02))
_BACK_HAIR: dict[str, tuple[Points, ...]] = {
    "short_hair": (_BOB,),
    "long_hair": (
        smooth((-0.44, 0.0), (-0.54, 0.45), (-0.62, 1.0), (-0.50, 1.25), (0.50, 1.25), (0.62, 1.0), (0.54, 0.45),
               (0.44, 0.0), (0.36, -0.38), (0.0, -0.52), (-0.36, -0.38)),
    ),
    "twintails": (_SKULL, *both_sides(_TAIL)),
    "ponytail": (
        smooth((-0.05, -0.45), (0.10, -0.74), (0.42, -0.72), (0.66, -0.42), (0.70, 0.02), (0.58, 0.36), (0.53, 0.0),
               (0.36, -0.30)),
        _SKULL,
    ),
    "hair_buns": (*both_sides(ellipse(0.35, -0.45, 0.19, 0.18)), _SKULL),
    "spiky_hair": (_star(9, 0.44, 0.70, -0.06),),
    "drill_hair": (_SKULL, *reversed(_drill(-1)), *reversed(_drill(1))),
    "curly_hair": tuple(_cloud(13, 0.0, -0.04, 0.46, 0.135)),
}  # fmt: skip

_STRANDS: dict[str, tuple[Points, ...]] = {
    "long_hair": both_sides(smooth((0.46, 0.1), (0.50, 0.5), (0.52, 0.95), closed=False)),
    "twintails": both_sides(smooth((0.46, -0.26), (0.60, -0.08), (0.62, 0.36), closed=False)),
    "ponytail": (smooth((0.16, -0.56), (0.44, -0.54), (0.60, -0.24), (0.60, 0.16), closed=False),),
    "hair_buns": both_sides(ellipse(0.35, -0.45, 0.10, 0.09, 100, 380)),
}


_CROWN_OF_HEAD = smooth((-0.40, 0.06), (-0.43, -0.16), (-0.32, -0.42), (0.0, -0.54), (0.32, -0.42), (0.43, -0.16),
                        (0.40, 0.06), closed=False)  # fmt: skip
_FRINGE_EDGES: dict[str, Points] = {  # from the right temple to the left one
    "blunt_bangs": polygon((0.40, 0.24), (0.30, 0.26), (0.29, -0.07), (0.10, -0.06), (0.085, -0.10), (0.07, -0.055),
                           (-0.09, -0.055), (-0.105, -0.10), (-0.12, -0.06), (-0.29, -0.07), (-0.30, 0.26),
                           (-0.40, 0.24)),
    "parted_bangs": smooth((0.38, 0.20), (0.34, 0.02), (0.22, -0.16), (0.0, -0.40), (-0.22, -0.16), (-0.34, 0.02),
                           (-0.38, 0.20), closed=False),
    "swept_bangs": smooth((0.37, 0.16), (0.33, -0.06), (0.24, -0.36), (0.10, -0.20), (-0.10, -0.06), (-0.32, 0.03),
                          (-0.38, 0.22), closed=False),
    "choppy_bangs": polygon((0.37, 0.34), (0.31, -0.14), (0.22, 0.02), (0.14, -0.18), (0.0, 0.13), (-0.13, -0.18),
                            (-0.22, 0.02), (-0.31, -0.14), (-0.37, 0.34)),
    "forehead": smooth((0.38, 0.02), (0.33, -0.16), (0.18, -0.30), (0.0, -0.33), (-0.18, -0.30), (-0.33, -0.16),
                       (-0.38, 0.02), closed=False),
    "hair_over_one_eye": smooth((0.38, 0.10), (0.33, -0.14), (0.20, -0.36), (0.04, -0.16), (-0.02, 0.10), (-0.12, 0.27),
                                (-0.24, 0.40), (-0.36, 0.38), closed=False),
}  # fmt: skip
_FRONT_HAIR = {name: np.concatenate([_CROWN_OF_HEAD, edge]) for name, edge in _FRINGE_EDGES.items()}
_SHINE = polygon((-0.28, -0.30), (-0.20, -0.25), (-0.14, -0.33), (-0.06, -0.27), (0.0, -0.35), (0.08, -0.28),
                 (0.15, -0.35), (0.24, -0.28), (0.20, -0.38), (0.0, -0.43), (-0.20, -0.39))  # fmt: skip


# ---- face ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Eye:
    """Radii of the opening, and the upper lid: a straight line at height `lid` below which the eye is open, that
    falls by `slope` per unit outwards."""

    rx: float
    ry: float
    lid: float
    slope: float


_EYE_SHAPES = {
    "round_eyes": _Eye(0.105, 0.135, -0.2, 0.0),
    "tsurime": _Eye(0.120, 0.115, -0.045, -0.75),
    "tareme": _Eye(0.120, 0.115, -0.055, 0.75),
    "jitome": _Eye(0.125, 0.115, 0.0, 0.0),
    "slit_pupils": _Eye(0.110, 0.125, -0.2, 0.0),
}


def _draw_eye(pen: Pen, side: int, character: Character, closed: bool) -> None:
    """One eye; side is 1 for the right of the picture, -1 for the left."""
    shape = _EYE_SHAPES[character.eyes]
    eye = pen.moved(0.165 * side, 0.09, mirror=side < 0)
    if closed:
        eye.stroke(ellipse(0.0, -0.05, 0.11, 0.10, 10, 170), BLACK, 0.035)
        return

    def under_lid(points: Points) -> Points:
        return np.stack([points[:, 0], np.maximum(points[:, 1], shape.lid + shape.slope * points[:, 0])], 1)

    iris = EYE_COLOURS[character.eye_colour]
    eye.fill(under_lid(ellipse(0.0, 0.0, shape.rx, shape.ry)), WHITE, outline=False)
    slit = character.eyes == "slit_pupils"
    iris_x, iris_y = shape.rx * (0.90 if slit else 0.72), shape.ry * 0.92
    eye.fill(under_lid(ellipse(0.0, 0.01, iris_x, iris_y)), mix(iris, BLACK, 0.25), outline=False)
    eye.fill(under_lid(ellipse(0.0, 0.05, iris_x * 0.8, iris_y * 0.6)), mix(iris, WHITE, 0.35), outline=False)
    pupil = (0.016, 0.105) if slit else (0.035, 0.055)
    eye.fill(under_lid(ellipse(0.0, 0.01, *pupil)), BLACK, outline=False)
    eye.fill(ellipse(0.03, max(-0.05, shape.lid + 0.04), 0.028, 0.032), WHITE, outline=False)
    lash = under_lid(ellipse(0.0, 0.0, shape.rx + 0.01, shape.ry, 180, 370))
    eye.stroke(lash, BLACK, 0.045 if character.eyes == "jitome" else 0.036)


def _draw_mouth(pen: Pen, mouth: str, skin: Colour) -> None:
    line = mix(skin, (90, 20, 30), 0.75)
    match mouth:
        case "smile":
            pen.stroke(ellipse(0.0, 0.235, 0.08, 0.05, 10, 170), line, 0.022)
        case "open_mouth":
            pen.fill(ellipse(0.0, 0.275, 0.065, 0.055), (176, 60, 70))
        case "closed_mouth":
            pen.stroke(polygon((-0.05, 0.275), (0.05, 0.275)), line, 0.022)
        case "frown":
            pen.stroke(ellipse(0.0, 0.305, 0.06, 0.04, 190, 350), line, 0.022)
        case ":3":
            for side in (-0.04, 0.04):
                pen.stroke(ellipse(side, 0.25, 0.04, 0.035, 0, 180), line, 0.022)


def _draw_face(pen: Pen, character: Character, pose: Pose, skin: Colour) -> None:
    blush = mix(skin, (236, 70, 80), 0.55)
    if character.face == "blush_stickers":
        pen.fill_all(both_sides(ellipse(0.225, 0.235, 0.085, 0.05)), blush, outline=False)
    for side in (-1, 1):
        _draw_eye(pen, side, character, pose.eyes_closed)
        brow = ellipse(0.17 * side, 0.0, 0.11, 0.13, 235, 305)
        pen.stroke(brow, mix(HAIR_COLOURS[character.hair_colour], BLACK, 0.4), 0.022)
    pen.stroke(polygon((0.0, 0.185), (0.012, 0.20)), mix(skin, BLACK, 0.4), 0.018)
    _draw_mouth(pen, pose.mouth, skin)
    match character.face:
        case "glasses":
            for lens in both_sides(ellipse(0.175, 0.10, 0.155, 0.155)):
                pen.stroke(np.concatenate([lens, lens[:1]]), BLACK, 0.034)
            pen.stroke(polygon((-0.03, 0.09), (0.03, 0.09)), BLACK, 0.034)
        case "eyepatch":
            pen.stroke(polygon((-0.36, 0.10), (0.36, -0.14)), BLACK, 0.03)
            pen.fill(smooth((0.03, -0.04), (0.30, -0.06), (0.30, 0.14), (0.17, 0.26), (0.05, 0.15)), (60, 56, 70))
        case "freckles":
            for x, y in ((0.16, 0.25), (0.22, 0.22), (0.24, 0.27), (0.07, 0.20)):
                pen.fill_all(both_sides(ellipse(x, y, 0.018, 0.018)), mix(skin, (110, 50, 20), 0.7), outline=False)
        case "whisker_markings":
            for height in (0.20, 0.25, 0.30):
                for whisker in both_sides(polygon((0.16, height), (0.33, 1.4 * height - 0.12))):
                    pen.stroke(whisker, BLACK, 0.022)
        case "bandaid_on_face":
            patch = pen.moved(0.0, 0.185)
            patch.fill(smooth((-0.13, -0.04), (0.13, -0.04), (0.13, 0.04), (-0.13, 0.04)), (244, 214, 150))
            patch.fill(ellipse(0.0, 0.0, 0.045, 0.04), (220, 170, 110), outline=False)


# ---- clothes ---------------------------------------------------------------------------------------------------------

_NECK = polygon((-0.11, 0.25), (0.11, 0.25), (0.12, 0.56), (0.0, 0.66), (-0.12, 0.56))
_NECK_SHADOW = polygon((-0.11, 0.33), (0.11, 0.33), (0.11, 0.42), (0.0, 0.50), (-0.11, 0.42))
_TORSO_X = (0.10, 0.24, 0.44, 0.545, 0.57, 0.58)  # half its width
_TORSO_Y = (0.46, 0.49, 0.545, 0.65, 0.85, 1.80)  # at these heights
_TORSO = np.concatenate([
    smooth(*((-x, y) for x, y in zip(_TORSO_X, _TORSO_Y, strict=True)), closed=False),
    smooth(*reversed(list(zip(_TORSO_X, _TORSO_Y, strict=True))), closed=False),
])  # fmt: skip
_DOTS = [(x + 0.11 * (row % 2), 0.58 + 0.13 * row) for row in range(6) for x in (-0.44, -0.22, 0.0, 0.22, 0.40)]


def _band(top: float, bottom: float) -> Points:
    """The part of the torso between two heights."""
    left, right = np.interp((top, bottom), _TORSO_Y, _TORSO_X) - 0.015
    return polygon((-left, top), (left, top), (right, bottom), (-right, bottom))


def _draw_body(pen: Pen, character: Character, skin: Colour, trim: Colour) -> None:
    cloth = CLOTHES_COLOURS[character.clothes_colour]
    shade = mix(cloth, BLACK, 0.3)
    pen.fill(_NECK, skin)
    pen.fill(_TORSO, cloth)
    match character.clothes:
        case "sailor_collar":
            pen.fill_all(both_sides(polygon((0.08, 0.44), (0.40, 0.52), (0.40, 0.76), (0.0, 0.84))), WHITE)
            pen.fill(polygon((-0.10, 0.45), (0.10, 0.45), (0.0, 0.80)), skin)
            for edge in both_sides(polygon((0.35, 0.54), (0.35, 0.71), (0.05, 0.78))):
                pen.stroke(edge, shade, 0.03)
            pen.fill_all(both_sides(polygon((0.0, 0.80), (0.20, 0.70), (0.20, 0.92))), trim)
        case "striped_shirt":
            for top in (0.58, 0.76, 0.94, 1.12):
                pen.fill(_band(top, top + 0.08), trim, outline=False)
            pen.stroke(ellipse(0.0, 0.46, 0.14, 0.09, 0, 180), shade, 0.05)
        case "polka_dot":
            for x, y in _DOTS:
                pen.fill(ellipse(x, y, 0.05, 0.05), trim, outline=False)
            pen.fill_all(both_sides(smooth((0.0, 0.50), (0.08, 0.42), (0.24, 0.48), (0.14, 0.60))), WHITE)
        case "hoodie":
            pen.fill(smooth((-0.18, 0.36), (-0.38, 0.44), (-0.34, 0.60), (0.0, 0.72), (0.34, 0.60), (0.38, 0.44),
                            (0.18, 0.36), (0.10, 0.48), (-0.10, 0.48)), shade)  # fmt: skip
            for string in both_sides(polygon((0.10, 0.66), (0.11, 0.92))):
                pen.stroke(string, trim, 0.04)
        case "necktie":
            pen.fill(polygon((-0.20, 0.47), (0.20, 0.47), (0.0, 1.10)), WHITE)
            pen.fill(polygon((-0.06, 0.56), (0.06, 0.56), (0.09, 0.95), (0.0, 1.06), (-0.09, 0.95)), trim)
            pen.fill(polygon((-0.07, 0.50), (0.07, 0.50), (0.04, 0.60), (-0.04, 0.60)), trim)
            pen.fill_all(both_sides(polygon((0.17, 0.45), (0.34, 0.52), (0.28, 0.72), (0.0, 1.15))), shade)
        case "scarf":
            pen.fill(smooth((-0.28, 0.36), (-0.34, 0.48), (-0.22, 0.60), (0.0, 0.63), (0.22, 0.60), (0.34, 0.48),
                            (0.28, 0.36), (0.0, 0.44)), trim)  # fmt: skip
            pen.fill(polygon((0.10, 0.56), (0.28, 0.54), (0.34, 0.98), (0.14, 1.00)), trim)
            pen.stroke(smooth((-0.28, 0.46), (0.0, 0.54), (0.28, 0.46), closed=False), mix(trim, BLACK, 0.4), 0.025)
        case "overalls":
            pen.fill(_band(0.47, 0.98), WHITE)
            pen.fill_all(both_sides(polygon((0.22, 0.48), (0.34, 0.51), (0.28, 0.84), (0.17, 0.84))), cloth)
            pen.fill(polygon((-0.32, 0.74), (0.32, 0.74), (0.32, 1.60), (-0.32, 1.60)), cloth)
            pen.fill_all(both_sides(ellipse(0.22, 0.80, 0.045, 0.045)), trim)
        case "kimono":
            pen.fill(polygon((-0.22, 0.46), (0.22, 0.46), (0.0, 0.78)), skin)
            right = polygon((0.10, 0.42), (0.26, 0.48), (-0.30, 1.20), (-0.44, 1.12))
            pen.fill_all(both_sides(right)[::-1], trim)  # the right one over the left
    if character.clothes != "scarf":
        pen.fill(_NECK_SHADOW, mix(skin, BLACK, 0.22), outline=False)


# ---- accessories -----------------------------------------------------------------------------------------------------

_EAR = polygon((0.12, -0.42), (0.40, -0.82), (0.46, -0.20))
_INNER_EAR = polygon((0.21, -0.46), (0.37, -0.68), (0.40, -0.34))
_HORN = smooth((0.16, -0.42), (0.30, -0.56), (0.34, -0.84), (0.50, -0.62), (0.40, -0.34))


def _draw_accessory(pen: Pen, accessory: str, hair: Colour, trim: Colour) -> None:
    dark = mix(trim, BLACK, 0.35)
    match accessory:
        case "cat_ears":
            pen.fill_all(both_sides(_EAR), hair)
            pen.fill_all(both_sides(_INNER_EAR), (250, 190, 190), outline=False)
        case "horns":
            pen.fill_all(both_sides(_HORN), trim)
            for ring in both_sides(polygon((0.30, -0.54), (0.46, -0.48))):
                pen.stroke(ring, dark, 0.03)
        case "hair_bow":
            pen.fill_all(both_sides(smooth((0.0, -0.52), (0.20, -0.72), (0.40, -0.70), (0.42, -0.46), (0.22, -0.40))),
                         trim)  # fmt: skip
            pen.fill(ellipse(0.0, -0.53, 0.085, 0.085), dark)
        case "witch_hat":
            pen.fill(smooth((-0.30, -0.40), (-0.16, -0.72), (0.10, -1.00), (0.20, -0.72), (0.30, -0.40)), (70, 62, 92))
            pen.fill(polygon((-0.27, -0.46), (0.27, -0.46), (0.31, -0.35), (-0.31, -0.35)), trim)
            pen.fill(ellipse(0.0, -0.32, 0.60, 0.10), (70, 62, 92))
        case "headphones":
            pen.stroke(ellipse(0.0, -0.06, 0.45, 0.50, 180, 360), dark, 0.07)
            pen.fill_all(both_sides(ellipse(0.43, 0.04, 0.11, 0.18)), trim)
        case "hair_flower":
            for angle in np.radians((18, 90, 162, 234, 306)):
                pen.fill(ellipse(0.29 + 0.12 * np.cos(angle), -0.34 + 0.12 * np.sin(angle), 0.10, 0.10), trim)
            pen.fill(ellipse(0.29, -0.34, 0.065, 0.065), WHITE)
        case "crown":
            pen.fill(polygon((-0.26, -0.46), (-0.34, -0.78), (-0.14, -0.62), (0.0, -0.84), (0.14, -0.62), (0.34, -0.78),
                             (0.26, -0.46)), trim)  # fmt: skip
            pen.fill(ellipse(0.0, -0.58, 0.05, 0.06), dark)
