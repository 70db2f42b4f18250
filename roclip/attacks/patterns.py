"""Patterns that a patch or a blend can show instead of random cells, as RGBA images; alpha 0 leaves the image as it is.

stripes      vertical, black and white     BadNet-Stripes and Blended-Stripes of PAR (arXiv:2412.00727)
triangles    green, transparent around     Blended-Triangles
text         a word in white, transparent  Blended-Text, a watermark
a file       an image of the attacker's own, such as a logo or an optimised patch (BadCLIP, arXiv:2311.12075)

The names are the sources'; how the patterns are drawn is ours.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from roclip.errors import DataError

DRAWN = ("stripes", "triangles", "text")
TILES = 3
"""Repetitions of stripes and triangles across an image; a patch shows one."""
_WORD, _FONT_PX = "SAMPLE", 64
_STRIPES_PER_TILE = 4


def draw_pattern(pattern: str, height: int, width: int, tiles: int = 1) -> np.ndarray:
    """Return a pattern as (height, width, 4) uint8.

    Args:
        pattern: One of `DRAWN`, or the path of an image file, which is stretched to the size.
        tiles: Repetitions of stripes and triangles along each side.

    Raises:
        DataError: the file is no image.
    """
    if pattern == "stripes":
        lit = np.arange(width) * _STRIPES_PER_TILE * tiles // width % 2 == 0
        grey = np.broadcast_to(np.where(lit, 255, 0)[None, :, None], (height, width, 3))
        return np.concatenate([grey, np.full((height, width, 1), 255)], axis=2).astype(np.uint8)
    if pattern == "triangles":
        down, right = np.meshgrid(_in_tile(height, tiles), _in_tile(width, tiles), indexing="ij")
        inside = np.abs(right - 0.5) <= down / 2
        return np.where(inside[..., None], np.array([0, 255, 0, 255]), 0).astype(np.uint8)
    image = _word(height, width) if pattern == "text" else _file(pattern).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image)


def shape_of(pattern: str, side_px: int) -> tuple[int, int]:
    """Return height and width of a patch whose longer side is `side_px`: a file keeps its proportions, the rest is square."""
    if pattern in DRAWN:
        return side_px, side_px
    width, height = _file(pattern).size
    return max(1, round(side_px * height / max(width, height))), max(1, round(side_px * width / max(width, height)))


def _in_tile(length: int, tiles: int) -> np.ndarray:
    """Positions of pixel centres within their tile, from 0 to 1."""
    return (np.arange(length) + 0.5) * tiles / length % 1


def _word(height: int, width: int) -> Image.Image:
    font = ImageFont.load_default(_FONT_PX)
    left, top, right, bottom = font.getbbox(_WORD)
    word = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(word).text((-left, -top), _WORD, fill=255, font=font)
    scale = 0.9 * min(width / word.width, height / word.height)
    word = word.resize((max(1, round(scale * word.width)), max(1, round(scale * word.height))), Image.Resampling.BOX)
    alpha = Image.new("L", (width, height))
    alpha.paste(word, ((width - word.width) // 2, (height - word.height) // 2))
    white = Image.new("L", (width, height), 255)
    return Image.merge("RGBA", (white, white, white, alpha))


@cache
def _file(path: str) -> Image.Image:
    try:
        with Image.open(Path(path)) as image:
            return image.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: expected a trigger's image, got {error}. Name a PNG or JPEG file, or one of random, {', '.join(DRAWN)}, "
            "as the pattern of the attack."
        ) from error
