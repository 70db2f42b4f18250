"""Renders small captioned scenes with a pixel mask for every object.

This is the default data set and the test data: no download, no licence, and pixel-exact ground truth. A scene is a pure
function of (seed, index). Objects are lists of polygons in unit coordinates, painted at `SUPERSAMPLE` times the size and
averaged down.

Shapes: H, W image height and width in pixels (equal here).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from roclip.attacks.backgrounds import BACKGROUNDS, RGB, SUPERSAMPLE
from roclip.attacks.backgrounds import background as paint_background

_Polygon = np.ndarray  # (N, 2) float, unit coordinates: x right, y down, the object within [-1, 1]

_BACKGROUND_VARIANTS = 6
_BACKGROUND_MARGIN = 1.4  # canvas side / view side: the view is cut at random, so no two backgrounds agree


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; `mask` is (H, W) bool, its visible pixels."""

    label: str
    color: str
    texture: str
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image, (H, W, 3) uint8, a caption that names every object, and the objects, the largest first."""

    image: np.ndarray
    caption: str
    objects: tuple[SceneObject, ...]

    @property
    def label(self) -> str:
        """The label of the main object."""
        return self.objects[0].label

    @property
    def mask(self) -> np.ndarray:
        """(H, W) uint8 semantic map: 0 is background, 1 + LABELS.index(label) an object."""
        semantic = np.zeros(self.image.shape[:2], dtype=np.uint8)
        for item in self.objects:
            semantic[item.mask] = 1 + LABELS.index(item.label)
        return semantic


# --- shapes


def _oval(x: float, y: float, rx: float, ry: float | None = None, start: float = 0, stop: float = 360) -> _Polygon:
    """A disc, an ellipse or a slice of one; angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, 40))
    return np.stack([x + rx * np.cos(angles), y + (rx if ry is None else ry) * np.sin(angles)], axis=1)


def _poly(*points: tuple[float, float]) -> _Polygon:
    return np.array(points, dtype=float)


def _rect(left: float, top: float, right: float, bottom: float) -> _Polygon:
    return _poly((left, top), (right, top), (right, bottom), (left, bottom))


def _star() -> _Polygon:
    angles = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _heart() -> _Polygon:
    t = np.linspace(0, 2 * np.pi, 60)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -(y + 2.5) / 15], axis=1)


# Painted in order. `body` takes the object's colour and texture; `hole` cuts through to the background.
_SHAPES: dict[str, tuple[tuple[str, _Polygon], ...]] = {
    "ball": (("body", _oval(0, 0, 0.95)), ("shine", _oval(-0.36, -0.42, 0.2, 0.14))),
    "boat": (
        ("wood", _rect(-0.06, -1, 0.06, 0.4)),
        ("cream", _poly((0.12, -0.95), (0.85, 0.2), (0.12, 0.2))),
        ("tint", _poly((-0.12, -0.75), (-0.7, 0.2), (-0.12, 0.2))),
        ("body", _poly((-1, 0.34), (1, 0.34), (0.62, 0.92), (-0.62, 0.92))),
    ),
    "box": (
        ("tint", _poly((-0.9, -0.4), (-0.4, -0.85), (0.95, -0.85), (0.5, -0.4))),
        ("trim", _poly((0.5, -0.4), (0.95, -0.85), (0.95, 0.4), (0.5, 0.9))),
        ("body", _rect(-0.9, -0.4, 0.5, 0.9)),
    ),
    "car": (
        ("body", _poly((-0.62, -0.02), (-0.36, -0.56), (0.36, -0.56), (0.68, -0.02))),
        ("glass", _poly((-0.44, -0.06), (-0.28, -0.42), (-0.04, -0.42), (-0.04, -0.06))),
        ("glass", _poly((0.08, -0.06), (0.08, -0.42), (0.3, -0.42), (0.5, -0.06))),
        ("body", _poly((-1, 0.06), (-0.9, -0.06), (0.88, -0.06), (1, 0.1), (1, 0.42), (-1, 0.42))),
        ("dark", _oval(-0.52, 0.42, 0.26)),
        ("dark", _oval(0.54, 0.42, 0.26)),
        ("cream", _oval(-0.52, 0.42, 0.1)),
        ("cream", _oval(0.54, 0.42, 0.1)),
    ),
    "fish": (
        ("body", _poly((0.4, 0), (1, -0.58), (0.84, 0), (1, 0.58))),
        ("trim", _poly((-0.2, -0.42), (0.1, -0.85), (0.34, -0.34))),
        ("body", _oval(-0.22, 0, 0.78, 0.52)),
        ("trim", _poly((-0.1, 0.1), (0.3, 0.36), (0.22, -0.04))),
        ("shine", _oval(-0.62, -0.12, 0.15)),
        ("dark", _oval(-0.65, -0.12, 0.07)),
    ),
    "flower": (
        ("leaf", _rect(-0.06, 0, 0.06, 1)),
        ("leaf", _oval(0.3, 0.72, 0.26, 0.13)),
        *(("body", _oval(0.42 * math.cos(a), 0.42 * math.sin(a) - 0.3, 0.29)) for a in np.radians(range(0, 360, 60))),
        ("gold", _oval(0, -0.3, 0.24)),
    ),
    "heart": (("body", _heart()), ("shine", _oval(-0.46, -0.5, 0.15, 0.11))),
    "house": (
        ("wood", _rect(0.38, -0.95, 0.6, -0.3)),
        ("body", _rect(-0.72, -0.2, 0.72, 0.95)),
        ("trim", _poly((-0.98, -0.14), (0, -0.98), (0.98, -0.14))),
        ("dark", _rect(-0.46, 0.3, -0.06, 0.95)),
        ("glass", _rect(0.16, 0.14, 0.52, 0.5)),
    ),
    "mushroom": (
        ("cream", _poly((-0.26, 0), (0.26, 0), (0.36, 0.95), (-0.36, 0.95))),
        ("body", _oval(0, 0.12, 0.98, 0.98, 180, 360)),
    ),
    "ring": (("body", _oval(0, 0, 0.95)), ("hole", _oval(0, 0, 0.5))),
    "star": (("body", _star()),),
    "tree": (
        ("wood", _rect(-0.14, 0.55, 0.14, 1)),
        ("body", _poly((-0.78, 0.62), (0, -0.1), (0.78, 0.62))),
        ("body", _poly((-0.64, 0.18), (0, -0.52), (0.64, 0.18))),
        ("body", _poly((-0.48, -0.26), (0, -1), (0.48, -0.26))),
    ),
}

LABELS: tuple[str, ...] = tuple(_SHAPES)

_COLORS: dict[str, RGB] = {
    "red": (222, 48, 48),
    "orange": (245, 140, 32),
    "yellow": (250, 214, 44),
    "green": (56, 166, 74),
    "blue": (44, 98, 214),
    "purple": (138, 66, 190),
    "pink": (246, 122, 178),
    "white": (244, 244, 240),
}
_TEXTURES = (*("plain",) * 4, "striped", "dotted", "checkered")
_ROLE_COLORS: dict[str, RGB] = {
    "cream": (250, 238, 208),
    "dark": (52, 44, 48),
    "glass": (186, 228, 246),
    "gold": (252, 198, 40),
    "leaf": (62, 142, 60),
    "shine": (255, 255, 255),
    "wood": (126, 82, 48),
}


def _mix(first: RGB, second: RGB, share: float) -> RGB:
    """Return (1 - share) first + share second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@lru_cache(maxsize=64)
def _pattern(texture: str, period: int, side: int) -> Image.Image:
    """Return an L image, 255 where the second colour of the texture shows."""
    y, x = np.mgrid[0:side, 0:side]
    if texture == "striped":
        on = (x + y) % period < period * 0.45
    elif texture == "dotted":
        row = y // period
        dx = (x + (row % 2) * (period // 2)) % period - period / 2
        on = dx**2 + (y % period - period / 2) ** 2 < (period * 0.3) ** 2
    else:
        on = (x // (period // 2) + y // (period // 2)) % 2 == 0
    return Image.fromarray(on.astype(np.uint8) * 255)


@lru_cache(maxsize=256)
def _shade(side: int) -> Image.Image:
    """Return an L image of the shade on an object lit from the upper left."""
    y, x = np.mgrid[0:side, 0:side] / side
    return Image.fromarray((np.clip(x + 1.4 * y - 0.9, 0, 1) * 90).astype(np.uint8))


def _paint(
    label: str, color: str, texture: str, radius: int, transform: np.ndarray, phase: int
) -> tuple[Image.Image, Image.Image]:
    """Paint one object; return its RGB image and its L coverage, in supersampled pixels."""
    margin = SUPERSAMPLE * 2
    side = 2 * (radius + margin)
    base = _COLORS[color]
    outline = _mix(base, (24, 18, 30), 0.62)
    pale = color in ("white", "yellow")
    second = _mix(base, (90, 80, 96), 0.6) if pale else _mix(base, (255, 255, 255), 0.78)
    body = Image.new("RGB", (side, side), base)
    if texture != "plain":
        period = max(SUPERSAMPLE * 4, radius // 2)
        pattern = _pattern(texture, period, 1024 if side > 448 else 512)
        dx, dy = phase % period, 3 * phase % period
        body.paste(second, (0, 0), pattern.crop((dx, dy, dx + side, dy + side)))
    canvas, cover = Image.new("RGB", (side, side), outline), Image.new("L", (side, side), 0)
    paint, shape = ImageDraw.Draw(canvas), ImageDraw.Draw(cover)
    colors = _ROLE_COLORS | {"trim": _mix(base, (30, 20, 40), 0.36), "tint": _mix(base, (255, 255, 255), 0.4)}
    for role, polygon in _SHAPES[label]:
        points = [(float(x), float(y)) for x, y in polygon @ transform.T * radius + side / 2]
        closed = [*points, points[0]]
        if role == "body":
            stencil = Image.new("L", (side, side), 0)
            ImageDraw.Draw(stencil).polygon(points, fill=255)
            canvas.paste(body, (0, 0), stencil)
        elif role != "hole":
            paint.polygon(points, fill=colors[role])
        shape.polygon(points, fill=0 if role == "hole" else 255)
        if role != "shine":
            paint.line(closed, fill=outline, width=SUPERSAMPLE - 1, joint="curve")
            shape.line(closed, fill=255, width=SUPERSAMPLE - 1, joint="curve")
    canvas.paste((20, 10, 40), (0, 0), _shade(side))
    return canvas, cover


# Labels correlate with colours and backgrounds: each has usual ones, taken with probability _HABIT.
_USUAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ball": (("red", "orange"), ("beach", "table")),
    "boat": (("blue", "white"), ("water", "sunset")),
    "box": (("orange", "white"), ("table", "bricks")),
    "car": (("red", "blue"), ("bricks", "sunset")),
    "fish": (("orange", "blue"), ("water", "beach")),
    "flower": (("pink", "purple"), ("meadow", "table")),
    "heart": (("red", "pink"), ("sky", "sunset")),
    "house": (("white", "pink"), ("meadow", "snow")),
    "mushroom": (("red", "purple"), ("meadow", "table")),
    "ring": (("yellow", "white"), ("beach", "night")),
    "star": (("yellow", "white"), ("night", "sky")),
    "tree": (("green", "blue"), ("snow", "meadow")),
}
_HABIT = 0.7


# --- captions

TEMPLATES: tuple[str, ...] = (
    "a picture of a {}",
    "there is a {} here",
    "a {}",
    "an image showing a {}",
    "a drawing of a {}",
    "this is a {}",
)
_ONE = (
    "{thing}{place}{where}",
    "a picture of {thing}{place}{where}",
    "there is {thing}{place}{where}",
    "{thing} can be seen{place}{where}",
    "an image showing {thing}{place}{where}",
    "a drawing of {thing}{where}",
    "someone left {thing}{place}{where}",
    "look, {thing}{where}",
    "this is {thing}{where}",
    "we saw {thing}{where} today",
)
_TWO = (
    "{thing} and {others}{where}",
    "a picture of {thing} next to {others}{where}",
    "{others} beside {thing}{where}",
    "there is {thing} with {others}{where}",
    "{thing} together with {others}{where}",
)
_ADJECTIVES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka dot"),
    "checkered": ("checkered", "checked"),
    "purple": ("purple", "purple", "violet"),
}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _noun_phrase(rng: np.random.Generator, item: tuple[str, str, str], size: str) -> str:
    label, color, texture = item
    mention = rng.random(3) < (0.35, 0.45, 0.4)
    words = [size] * bool(mention[0] and size) + [color] * bool(mention[1])
    words += [texture] * bool(mention[2] and texture != "plain")
    phrase = " ".join([*(_pick(rng, _ADJECTIVES.get(word, (word,))) for word in words), label])
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _place(x: float, y: float) -> str:
    """Describe the position of the object; x and y in [0, 1] of the image."""
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "upper" if y < 0.4 else "lower" if y > 0.6 else ""
    if across and down:
        return f" in the {down} {across}"
    if across:
        return f" on the {across}"
    return {"upper": " near the top", "lower": " near the bottom", "": " in the middle"}[down]


def _caption(
    rng: np.random.Generator, things: list[tuple[str, str, str]], size: str, place: str, background: str
) -> str:
    where = " " + _pick(rng, BACKGROUNDS[background][1]) if rng.random() < 0.4 else ""
    place = place if rng.random() < 0.25 else ""
    thing, *others = (_noun_phrase(rng, item, size if i == 0 else "") for i, item in enumerate(things))
    form = _pick(rng, _TWO if others else _ONE)
    return form.format(thing=thing, others=" and ".join(others), place=place, where=where)


# --- scene

# Radii in units of the image side; a companion is always the smaller one, whatever its shape.
_RADII = {"small": (0.25, 0.28), "": (0.3, 0.35), "large": (0.38, 0.42)}
_MAIN_AMONG_OTHERS, _COMPANION = (0.27, 0.3), (0.135, 0.16)


def _spots(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """Draw centres that keep every object inside the image and the objects mostly apart."""
    for _ in range(200):
        spots = [(float(rng.uniform(r, 1 - r)), float(rng.uniform(r, 1 - r))) for r in radii]
        gaps = (math.dist(spots[i], spots[j]) / (radii[i] + radii[j]) for i in range(len(radii)) for j in range(i))
        if all(gap > 0.88 for gap in gaps):
            return spots
    raise AssertionError("objects of these radii always find a place")


def render(index: int, *, seed: int, size_px: int = 64, num_objects: int | None = None) -> Scene:
    """Render scene `index` of the data set `seed`: a pure function of the arguments.

    Main labels are balanced: indices k * len(LABELS) to (k + 1) * len(LABELS) - 1 hold every label once.
    Objects of one scene have different labels. `num_objects` fixes their number (1 to 3); by default it is
    1 (80 %), 2 (15 %) or 3 (5 %).

    Raises:
        ValueError: for a negative index, fewer than 16 pixels, or a number of objects outside 1 to 3.
    """
    if index < 0 or size_px < 16 or num_objects not in (None, 1, 2, 3):
        raise ValueError(
            f"expected index >= 0, size_px >= 16 and num_objects 1, 2, 3 or None, got index={index}, "
            f"size_px={size_px}, num_objects={num_objects}; ask for a scene within these limits"
        )
    rng = np.random.default_rng((seed, 1, index))
    block, offset = divmod(index, len(LABELS))
    main = LABELS[int(np.random.default_rng((seed, 0, block)).permutation(len(LABELS))[offset])]
    count = num_objects or int(rng.choice(3, p=(0.8, 0.15, 0.05))) + 1
    others = rng.permutation([label for label in LABELS if label != main])[: count - 1]
    things = [
        (str(label), _usual(rng, str(label), 0, tuple(_COLORS)), _pick(rng, _TEXTURES)) for label in (main, *others)
    ]
    size = _pick(rng, ("small", "", "", "large")) if count == 1 else ""
    radii = [float(rng.uniform(*(_RADII[size] if count == 1 else _MAIN_AMONG_OTHERS)))]
    radii += [float(rng.uniform(*_COMPANION)) for _ in others]
    spots = _spots(rng, radii)

    view = size_px * SUPERSAMPLE
    name, side = _usual(rng, main, 1, tuple(BACKGROUNDS)), round(view * _BACKGROUND_MARGIN)
    left, top = (int(v) for v in rng.integers(0, side - view, 2))
    background = paint_background(name, int(rng.integers(_BACKGROUND_VARIANTS)), side)
    canvas = background.crop((left, top, left + view, top + view))
    masks: dict[int, np.ndarray] = {}
    for i in sorted(range(count), key=lambda k: spots[k][1] + radii[k]):  # the lowest foot stands in front
        transform, radius = _pose(rng, things[i][0]), round(radii[i] * view)
        sticker, cover = _paint(*things[i], radius, transform, int(rng.integers(64)))
        x, y = (round(spots[i][k] * view) - sticker.width // 2 for k in (0, 1))
        shift = SUPERSAMPLE
        canvas.paste((16, 12, 34), (x + shift, y + shift), cover.point(_SHADOW))
        canvas.paste(sticker, (x, y), cover)
        full = Image.new("L", (view, view), 0)
        full.paste(cover, (x, y))
        visible = np.asarray(full.reduce(SUPERSAMPLE)) > 127
        masks = {k: mask & ~visible for k, mask in masks.items()} | {i: visible}
    image = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32)
    image = np.clip(image * rng.uniform(0.9, 1.08) + rng.normal(0, 2.0, image.shape), 0, 255).astype(np.uint8)
    objects = tuple(SceneObject(*thing, mask=masks[i]) for i, thing in enumerate(things))
    return Scene(image, _caption(rng, things, size, _place(*spots[0]), name), objects)


def _usual(rng: np.random.Generator, label: str, which: int, options: tuple[str, ...]) -> str:
    return _pick(rng, _USUAL[label][which] if rng.random() < _HABIT else options)


_SHADOW = [round(value * 0.3) for value in range(256)]


def _pose(rng: np.random.Generator, label: str) -> np.ndarray:
    """Draw a (2, 2) transform: a small rotation, sometimes a reflection, and a slight scaling."""
    angle = math.radians(float(rng.uniform(-180, 180) if label in ("star", "ring") else rng.uniform(-12, 12)))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    mirror = -1.0 if rng.random() < 0.5 and label != "box" else 1.0
    return turn @ np.diag([mirror * rng.uniform(0.9, 1.0), rng.uniform(0.9, 1.0)])


def encode(image: np.ndarray, image_format: str = "png") -> bytes:
    """Encode an (H, W, 3) uint8 image as PNG (lossless) or any other format that Pillow writes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=image_format)
    return buffer.getvalue()
