"""A perceptual hash: 64 bits, few of which change when an image is resized or recompressed.

The hash of the library ImageHash (`phash`), bit for bit except for how the image is reduced: the signs of the 8 x 8 lowest
frequencies of the grey image at 32 x 32 px, relative to their median.
"""

import math

import cv2
import numpy as np

SIDE_PX = 32
LOW = 8
"""Frequencies used along each side."""
FLAT_LEVELS = 8
"""Grey levels between the darkest and the lightest of the 32 x 32 px below which an image counts as flat and has no hash."""
NEAR_BITS = 8
"""Images whose hashes differ in at most this many bits count as the same."""
_BITS = LOW * LOW
_ROWS = 4
"""Rows of a large image that are averaged for each of the 32: more would not change the hash."""


def phash(pixels: np.ndarray) -> int | None:
    """The hash of (H, W) grey or (H, W, 3) BGR pixels, uint8; None for an image of one colour, whose bits would be noise."""
    rows = pixels[:: max(1, len(pixels) // (SIDE_PX * _ROWS))]
    grey = cv2.cvtColor(rows, cv2.COLOR_BGR2GRAY) if rows.ndim == 3 else rows
    small = cv2.resize(grey, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    darkest, lightest, _, _ = cv2.minMaxLoc(small)
    if lightest - darkest < FLAT_LEVELS:
        return None
    low = cv2.dct(small.astype(np.float32))[:LOW, :LOW]
    low[0] *= math.sqrt(2)  # as in a transform that is not normalised
    low[:, 0] *= math.sqrt(2)
    middle = np.sort(low, axis=None)[_BITS // 2 - 1 : _BITS // 2 + 1].mean()
    return int.from_bytes(np.packbits(low > middle).tobytes(), "big")


def distance(one: int, other: int) -> int:
    """The Hamming distance of two hashes, in bits."""
    return (one ^ other).bit_count()
