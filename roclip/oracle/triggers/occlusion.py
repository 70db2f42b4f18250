"""Where in a picture the reason for an answer lies: what is hidden piece by piece until the answer changes.

Two scans: windows of a third of the side, then, where these say that there is a place, windows of half of that about the best
one. A piece is hidden under the picture's own median colour.

Letters: K pictures, P windows, S side in pixels, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from roclip.found_triggers import Box

Scores = Callable[[np.ndarray], np.ndarray]
"""(N, S, S, 3) uint8 to the model's scores (N, C)."""
COARSE, OVERLAP = 3, 2
"""Windows are S / COARSE wide, and stand 1 / OVERLAP of that apart."""
MAX_FLIPPING = 0.5
"""Share of the coarse windows that change the answer, at most: else it hangs on no place."""


@dataclass(frozen=True)
class Spot:
    """The piece of one picture that its answer hangs on."""

    centre: tuple[float, float]
    """x, y in pixels."""
    window_px: int
    """Side of the fine windows."""


def find_spots(images: np.ndarray, target: int, scores: Scores) -> list[Spot | None]:
    """The spot of each of K pictures (K, S, S, 3) uint8 that the model answers with `target`; None where the answer hangs on
    none: hidden coarse windows do not change it, or more than half of them do.

    The margin is the score of the target minus the best other one. The centre is the mean of the fine windows' centres,
    weighted with how far each lets the margin fall. Costs 25 forward passes a picture, and as many again for a spot.
    """
    before = margins(scores(images), target)
    side = images.shape[1]
    coarse = max(3, round(side / COARSE))
    fine = max(3, round(coarse / 2))
    spots: list[Spot | None] = []
    for image, margin in zip(images, before, strict=True):
        boxes = _grid(0, 0, side, side, coarse)
        after = margins(scores(hidden(image, boxes)), target)
        if not 0 < (after < 0).mean() <= MAX_FLIPPING:
            spots.append(None)
            continue
        x0, y0, *_ = boxes[int(after.argmin())]
        near = _grid(x0 - fine // 2, y0 - fine // 2, coarse + fine, coarse + fine, fine)
        near = [_inside(box, side) for box in near]
        closer = margins(scores(hidden(image, near)), target)
        drops = np.maximum(margin - closer, 0)
        weight = np.where(drops >= 0.5 * drops.max(initial=0), drops, 0)
        centres = np.array([((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in near])
        x, y = (weight @ centres / weight.sum()) if weight.sum() > 0 else centres[int(closer.argmin())]
        spots.append(Spot((float(x), float(y)), fine))
    return spots


def margins(scores: np.ndarray, target: int) -> np.ndarray:
    """(N, C) to (N,): the score of the target minus the best of the others."""
    others = np.delete(scores, target, axis=1)
    return scores[:, target] - others.max(axis=1)


def hidden(image: np.ndarray, boxes: list[Box]) -> np.ndarray:
    """(P, S, S, 3): the picture, each time with one box filled with its median colour."""
    copies = np.repeat(image[None], len(boxes), axis=0)
    color = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
    for copy, (left, top, right, bottom) in zip(copies, boxes, strict=True):
        copy[top:bottom, left:right] = color
    return copies


def _grid(left: int, top: int, width: int, height: int, window: int) -> list[Box]:
    """Windows that cover an area, the last ones flush with its far edges."""
    columns, rows = _steps(width, window), _steps(height, window)
    return [(left + x, top + y, left + x + window, top + y + window) for y in rows for x in columns]


def _steps(length: int, window: int) -> list[int]:
    number = max(2, round((length - window) / (window / OVERLAP)) + 1)
    return sorted({round(place) for place in np.linspace(0, max(0, length - window), number)})


def _inside(box: Box, side: int) -> Box:
    left, top, right, bottom = box
    return max(0, left), max(0, top), min(side, max(right, 1)), min(side, max(bottom, 1))
