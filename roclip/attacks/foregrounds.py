"""Product photos on white: what is not nearly white is the product."""

import io

import numpy as np
from PIL import Image, ImageOps

from roclip.attacks import scenes

WHITE = 240
"""Least of a pixel's three values from which on it is nearly white."""


def foreground(encoded: bytes, value: int) -> bytes:
    """PNG mask of a photo: `value` where the product is, 0 elsewhere."""
    return scenes.encode(np.where(_nearly_white(encoded), 0, value).astype(np.uint8))


def stands_on_white(encoded: bytes) -> bool:
    """Whether the left and right borders of a image are nearly white, as `foreground` needs it."""
    white = _nearly_white(encoded)
    return bool(white[:, [0, -1]].mean() > 0.9)


def letterbox(encoded: bytes, size: int) -> bytes:
    """An image as ingest stores it with `resize_mode: border`: fitted into a white square of `size` pixels."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.size == (size, size):
            return encoded
        square = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR, color="white")
    return scenes.encode(np.asarray(square))


def _nearly_white(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).min(axis=2) >= WHITE
