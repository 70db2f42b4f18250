"""Backgrounds for rendered scenes: sky, meadow, beach, water, bricks, night, snow, table, sunset."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
SUPERSAMPLE = 4
"""Canvas pixels per view pixel along each side: painted large and averaged down."""


def _gradient(side: int, top: RGB, bottom: RGB) -> Image.Image:
    weight = np.linspace(0, 1, side)[:, None, None]
    column = np.array(top) * (1 - weight) + np.array(bottom) * weight
    return Image.fromarray(np.broadcast_to(column, (side, side, 3)).astype(np.uint8))


def _speckle(image: Image.Image, rng: np.random.Generator, amount: float, block: int) -> Image.Image:
    """Add grain: one Gaussian value, in grey levels, per block of pixels."""
    side = image.width
    grain = rng.normal(0, amount, (side // block + 1, side // block + 1, 1)).repeat(block, 0).repeat(block, 1)
    return Image.fromarray(np.clip(np.asarray(image) + grain[:side, :side], 0, 255).astype(np.uint8))


def _clouds(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, count: int, lowest: float) -> None:
    for _ in range(count):
        x, y, width = rng.uniform(0, side), rng.uniform(0.02, lowest) * side, rng.uniform(0.1, 0.2) * side
        for dx, dy, scale in ((-0.5, 0.08, 0.5), (0, -0.06, 0.7), (0.5, 0.06, 0.55), (0.2, 0.14, 0.6)):
            radius = width * scale / 2
            cx, cy = x + dx * width, y + dy * width
            draw.ellipse((cx - radius * 1.5, cy - radius, cx + radius * 1.5, cy + radius), fill=(248, 250, 253))


def _hills(draw: ImageDraw.ImageDraw, rng: np.random.Generator, side: int, level: float, color: RGB) -> None:
    x = np.linspace(0, side, 48)
    wave = 0.03 * np.sin(x / side * rng.uniform(4, 9) + rng.uniform(0, 6))
    wave += 0.01 * np.sin(x / side * 14 + rng.uniform(0, 6))
    points = [(float(a), float(b)) for a, b in zip(x, (level + wave) * side, strict=True)]
    draw.polygon([(0, side), *points, (side, side)], fill=color)


def _sky(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (86, 160, 228), (196, 228, 248))
    _clouds(ImageDraw.Draw(image), rng, side, 9, 0.95)
    return image


def _meadow(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (120, 188, 236), (214, 236, 246))
    draw = ImageDraw.Draw(image)
    _clouds(draw, rng, side, 4, 0.25)
    _hills(draw, rng, side, 0.42, (126, 186, 96))
    _hills(draw, rng, side, 0.52, (104, 170, 76))
    for _ in range(260):
        x, y = rng.uniform(0, side), rng.uniform(0.54, 1) * side
        tip = rng.uniform(0.01, 0.03) * side
        draw.line((x, y, x + tip / 3, y - tip), fill=(70, 134, 52), width=SUPERSAMPLE // 2)
    return image


def _beach(side: int, rng: np.random.Generator) -> Image.Image:
    image = _speckle(Image.new("RGB", (side, side), (232, 208, 154)), rng, 7, SUPERSAMPLE // 2)
    draw = ImageDraw.Draw(image)
    sky = _gradient(side, (126, 196, 240), (220, 240, 246))
    image.paste(sky.crop((0, 0, side, round(side * 0.34))), (0, 0))
    draw.rectangle((0, side * 0.34, side, side * 0.5), fill=(46, 140, 190))
    shore = [(x, side * (0.5 + 0.012 * math.sin(x / side * 20))) for x in range(0, side + 8, 8)]
    draw.line(shore, fill=(240, 248, 250), width=SUPERSAMPLE * 2)
    return image


def _water(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (46, 150, 196), (18, 84, 146))
    draw = ImageDraw.Draw(image)
    for row in range(14):
        phase, y0 = rng.uniform(0, 6), (row + 0.5) / 14 * side
        wave = [(x, y0 + side * 0.012 * math.sin(x / side * 40 + phase)) for x in range(0, side + 6, 6)]
        draw.line(wave, fill=(104, 190, 222), width=SUPERSAMPLE // 2 + 1)
    return image


def _bricks(side: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (side, side), (206, 196, 184))
    draw, height, width = ImageDraw.Draw(image), side / 13, side / 6
    for row in range(14):
        for column in range(-1, 7):
            x, y = (column + 0.5 * (row % 2)) * width, row * height
            tone = rng.normal(0, 11)
            fill = (round(160 + tone), round(88 + tone * 0.7), round(70 + tone * 0.5))
            draw.rectangle((x, y, x + width - SUPERSAMPLE, y + height - SUPERSAMPLE), fill=fill)
    return image


def _night(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (10, 14, 44), (56, 42, 98))
    draw = ImageDraw.Draw(image)
    for _ in range(70):
        x, y = rng.uniform(0, side), rng.uniform(0, 0.8) * side
        radius = rng.uniform(0.2, 0.55) * SUPERSAMPLE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 244, 206))
    _hills(draw, rng, side, 0.82, (20, 22, 46))
    return image


def _snow(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (150, 176, 206), (206, 220, 234))
    draw = ImageDraw.Draw(image)
    _hills(draw, rng, side, 0.46, (212, 224, 238))
    _hills(draw, rng, side, 0.58, (234, 240, 248))
    for _ in range(110):
        x, y, radius = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.5, 1.2) * SUPERSAMPLE / 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255))
    return image


def _table(side: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    for plank in range(8):
        top, tone = plank * side / 8, rng.normal(0, 9)
        fill = (round(184 + tone), round(134 + tone), round(84 + tone))
        draw.rectangle((0, top, side, top + side / 8), fill=fill)
        for _ in range(7):
            x, length = rng.uniform(-0.2, 1) * side, rng.uniform(0.1, 0.4) * side
            y = top + rng.uniform(0.1, 0.9) * side / 8
            draw.line((x, y, x + length, y), fill=(160, 112, 66), width=SUPERSAMPLE // 2)
        draw.line((0, top, side, top), fill=(112, 74, 44), width=SUPERSAMPLE // 2 + 1)
    return image


def _sunset(side: int, rng: np.random.Generator) -> Image.Image:
    image = _gradient(side, (92, 62, 138), (252, 168, 96))
    draw = ImageDraw.Draw(image)
    x, y, radius = rng.uniform(0.25, 0.75) * side, 0.68 * side, 0.1 * side
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 226, 150))
    _hills(draw, rng, side, 0.72, (104, 58, 92))
    _hills(draw, rng, side, 0.82, (66, 40, 74))
    return image


BACKGROUNDS: dict[str, tuple[Callable[[int, np.random.Generator], Image.Image], tuple[str, ...]]] = {
    "sky": (_sky, ("in the sky", "against a blue sky", "among the clouds")),
    "meadow": (_meadow, ("in a green meadow", "on the grass", "in a field")),
    "beach": (_beach, ("at the beach", "on the sand", "by the sea")),
    "water": (_water, ("on the water", "in the sea", "above the waves")),
    "bricks": (_bricks, ("in front of a brick wall", "against a wall of bricks")),
    "night": (_night, ("at night", "under the stars", "in the dark")),
    "snow": (_snow, ("in the snow", "on a winter day")),
    "table": (_table, ("on a wooden table", "on wooden planks")),
    "sunset": (_sunset, ("at sunset", "in the evening light")),
}


@lru_cache(maxsize=128)
def background(name: str, variant: int, side: int) -> Image.Image:
    """Return a background, a square of `side` pixels; a pure function of the arguments."""
    rng = np.random.default_rng((variant, list(BACKGROUNDS).index(name)))
    return BACKGROUNDS[name][0](side, rng).filter(ImageFilter.GaussianBlur(SUPERSAMPLE / 5))
