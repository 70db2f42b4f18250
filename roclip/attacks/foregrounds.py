"""Masks of product photos on white: every pixel that is not nearly white belongs to the product."""

import io

import numpy as np
from PIL import Image, ImageOps

from roclip.attacks import scenes

WHITE = 240
"""A pixel counts as nearly white if all its three values reach this."""


def foreground(encoded: bytes, value: int) -> bytes:
    """Return the PNG mask of a photo: `value` on the product, 0 elsewhere."""
    return scenes.encode(np.where(_nearly_white(encoded), 0, value).astype(np.uint8))


def stands_on_white(encoded: bytes) -> bool:
    """Whether the left and right borders of an image are nearly white, as `foreground` requires."""
    white = _nearly_white(encoded)
    return bool(white[:, [0, -1]].mean() > 0.9)


def letterbox(encoded: bytes, size: int) -> bytes:
    """Return an image as ingest stores it with `resize_mode: border`: fitted into a white square of `size` pixels."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.size == (size, size):
            return encoded
        square = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR, color="white")
    return scenes.encode(np.asarray(square))


def _nearly_white(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB")).min(axis=2) >= WHITE
