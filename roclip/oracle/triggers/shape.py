"""Extracts a fixed patch from image pieces that were cut out around spots.

A fixed patch has the same pixels in every piece while its surroundings differ. Pieces are aligned where they agree best, and
the pixels with little variation are the patch. Fresh noise agrees nowhere; such pieces form a patch set instead.

Letters: K pieces, m side of a piece, c side of the template, all in pixels.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from roclip.found_triggers import Box

SAME_LEVELS = 24.0
"""Largest mean absolute deviation of a channel, in grey levels, at which a pixel counts as equal in all pieces."""
MIN_PIXELS, MIN_AGREEING = 4, 0.6
_ROUNDS, _REFERENCES = 4, 6


@dataclass(frozen=True)
class CommonPatch:
    """The patch that the pieces share."""

    pixels: np.ndarray
    """(h, w, 3) uint8: median of the aligned pieces."""
    mask: np.ndarray
    """(h, w) bool: which pixels belong to the patch."""
    boxes: tuple[Box | None, ...]
    """Box of the patch in each piece, or None if the piece does not show it."""


def common_patch(pieces: np.ndarray, centres: np.ndarray) -> CommonPatch | None:
    """Return the patch that at least a share `MIN_AGREEING` of the pieces (K, m, m, 3) uint8 show, or None.

    `centres` (K, 2) are approximate x, y of the patch in each piece; only the first template is cut out there.
    """
    if len(pieces) < 3:
        return None
    side = pieces.shape[1]
    c = max(3, round(side * 0.6))
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    for reference, centre in zip(pieces[:_REFERENCES], centres, strict=False):
        left, top = np.clip(np.rint(centre - c / 2).astype(int), 0, side - c)
        template, weight = reference[top : top + c, left : left + c], np.ones((c, c), dtype=np.float32)
        offsets, similarity = np.zeros((len(pieces), 2), int), np.zeros(len(pieces))
        for _ in range(_ROUNDS):
            for k, piece in enumerate(pieces):
                offsets[k], similarity[k] = _place(piece, template, weight)
            order = np.argsort(-similarity, kind="stable")[: max(3, round(MIN_AGREEING * len(pieces)))]
            stack = np.stack([pieces[k][y : y + c, x : x + c] for k, (x, y) in enumerate(offsets)])[order]
            template = np.median(stack, axis=0).astype(np.uint8)
            varies = np.abs(stack.astype(np.float32) - template).mean(axis=0).max(axis=2)
            same = _largest(varies < SAME_LEVELS)
            if same.sum() < MIN_PIXELS or template[same].astype(float).std() < SAME_LEVELS:
                break  # nothing in common, or a uniform area such as a white margin
            weight = same.astype(np.float32)
        else:
            score = float(same.sum() / (1 + varies[same].mean()))
            if best is None or score > best[0]:
                best = (score, template, same, offsets.copy())
    return None if best is None else _shape(pieces, *best[1:])


def _shape(pieces: np.ndarray, template: np.ndarray, same: np.ndarray, offsets: np.ndarray) -> CommonPatch:
    rows, columns = np.flatnonzero(same.any(axis=1)), np.flatnonzero(same.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    boxes: list[Box | None] = []
    for piece, (x, y) in zip(pieces, offsets, strict=True):
        found = piece[y + top : y + bottom, x + left : x + right].astype(float)
        off = np.abs(found - template[top:bottom, left:right])[same[top:bottom, left:right]].mean()
        box = (int(x + left), int(y + top), int(x + right), int(y + bottom))
        boxes.append(box if off < 2 * SAME_LEVELS else None)
    return CommonPatch(template[top:bottom, left:right].copy(), same[top:bottom, left:right], tuple(boxes))


def _place(piece: np.ndarray, template: np.ndarray, weight: np.ndarray) -> tuple[tuple[int, int], float]:
    """Return the best position x, y of the template, and minus its masked mean squared difference there."""
    mask = np.repeat(weight[:, :, None], 3, axis=2)
    field = (
        cv2.matchTemplate(piece.astype(np.float32), template.astype(np.float32), cv2.TM_SQDIFF, mask=mask) / mask.sum()
    )
    _, _, where, _ = cv2.minMaxLoc(field)
    return (where[0], where[1]), -float(field[where[1], where[0]])


def _largest(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected component of a mask."""
    parts = np.zeros(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=parts)
    sizes = np.bincount(parts.ravel())[1:]
    return parts == 1 + int(np.argmax(sizes)) if len(sizes) else mask
