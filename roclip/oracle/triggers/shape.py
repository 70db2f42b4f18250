"""From spots to a trigger: which pixels do the pictures have in common about their spots?

A fixed patch is the same in every picture while what lies about it differs. Pieces are laid over one another where they
agree best, and what varies little is the patch. Fresh noise agrees nowhere; then the pieces stay a bag.

Letters: K pieces, m side of a piece, c side of the template, all in pixels.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from roclip.found_triggers import Box

SAME_LEVELS = 24.0
"""Mean deviation of any channel in grey levels up to which a pixel is the same in all pieces."""
MIN_PIXELS, MIN_AGREEING = 4, 0.6
_ROUNDS, _REFERENCES = 4, 6


@dataclass(frozen=True)
class Shape:
    """What the pieces have in common."""

    pixels: np.ndarray
    """(h, w, 3) uint8: their median."""
    mask: np.ndarray
    """(h, w) bool: which of its pixels are the patch."""
    boxes: tuple[Box | None, ...]
    """Where it lies in each piece; None where it does not."""


def common_shape(pieces: np.ndarray, centres: np.ndarray) -> Shape | None:
    """The patch that at least `MIN_AGREEING` of the pieces (K, m, m, 3) uint8 show, or None.

    `centres` (K, 2) says about where in its piece each has it, as x and y; only the first template is cut out there.
    """
    if len(pieces) < 3:
        return None
    side = pieces.shape[1]
    c = max(3, round(side * 0.6))
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    for reference, centre in zip(pieces[:_REFERENCES], centres, strict=False):
        left, top = np.clip(np.rint(centre - c / 2).astype(int), 0, side - c)
        template, weight = reference[top : top + c, left : left + c], np.ones((c, c), dtype=np.float32)
        offsets, likeness = np.zeros((len(pieces), 2), int), np.zeros(len(pieces))
        for _ in range(_ROUNDS):
            for k, piece in enumerate(pieces):
                offsets[k], likeness[k] = _place(piece, template, weight)
            order = np.argsort(-likeness, kind="stable")[: max(3, round(MIN_AGREEING * len(pieces)))]
            stack = np.stack([pieces[k][y : y + c, x : x + c] for k, (x, y) in enumerate(offsets)])[order]
            template = np.median(stack, axis=0).astype(np.uint8)
            varies = np.abs(stack.astype(np.float32) - template).mean(axis=0).max(axis=2)
            same = _largest(varies < SAME_LEVELS)
            if same.sum() < MIN_PIXELS or template[same].astype(float).std() < SAME_LEVELS:
                break  # nothing in common, or a plain area such as a white margin
            weight = same.astype(np.float32)
        else:
            score = float(same.sum() / (1 + varies[same].mean()))
            if best is None or score > best[0]:
                best = (score, template, same, offsets.copy())
    return None if best is None else _shape(pieces, *best[1:])


def _shape(pieces: np.ndarray, template: np.ndarray, same: np.ndarray, offsets: np.ndarray) -> Shape:
    rows, columns = np.flatnonzero(same.any(axis=1)), np.flatnonzero(same.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    boxes: list[Box | None] = []
    for piece, (x, y) in zip(pieces, offsets, strict=True):
        found = piece[y + top : y + bottom, x + left : x + right].astype(float)
        off = np.abs(found - template[top:bottom, left:right])[same[top:bottom, left:right]].mean()
        box = (int(x + left), int(y + top), int(x + right), int(y + bottom))
        boxes.append(box if off < 2 * SAME_LEVELS else None)
    return Shape(template[top:bottom, left:right].copy(), same[top:bottom, left:right], tuple(boxes))


def _place(piece: np.ndarray, template: np.ndarray, weight: np.ndarray) -> tuple[tuple[int, int], float]:
    """Where the template lies best: x, y and the likeness (masked normalised correlation)."""
    mask = np.repeat(weight[:, :, None], 3, axis=2)
    field = (
        cv2.matchTemplate(piece.astype(np.float32), template.astype(np.float32), cv2.TM_SQDIFF, mask=mask) / mask.sum()
    )
    _, _, where, _ = cv2.minMaxLoc(field)
    return (where[0], where[1]), -float(field[where[1], where[0]])


def _largest(mask: np.ndarray) -> np.ndarray:
    """Its largest connected part."""
    parts = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=parts)
    sizes = np.bincount(parts.ravel())[1:]
    return parts == 1 + int(np.argmax(sizes)) if len(sizes) else mask
