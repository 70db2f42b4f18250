"""A perceptual hash: 64 bits of which few change when a picture is scaled or compressed again.

The hash of the library ImageHash (`phash`), bit for bit but for how the picture is made small: the signs of the 8 x 8 lowest
frequencies of the grey picture at 32 x 32 px, against their median.
"""

import math

import cv2
import numpy as np

SIDE_PX = 32
LOW = 8
"""Frequencies taken along each side."""
FLAT_LEVELS = 8
"""Grey levels between the darkest and the lightest of the 32 x 32 px, below which nothing is there to be hashed."""
NEAR_BITS = 8
"""Two pictures whose hashes differ in so many bits or fewer are taken for the same."""
_BITS = LOW * LOW
_ROWS = 4
"""Of a large picture so many rows are averaged for each of the 32: more change nothing that the hash sees."""


def phash(pixels: np.ndarray) -> int | None:
    """The hash of (H, W) grey or (H, W, 3) BGR pixels, uint8; None for a picture of one colour, whose bits would be noise."""
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
    """Bits in which two hashes differ."""
    return (one ^ other).bit_count()
