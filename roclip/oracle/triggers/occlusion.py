"""Occlusion: locates the part of an image that its answer depends on, by covering it window by window.

Two passes: coarse windows of a third of the side; then, if those locate a place, windows of half that size about the best.
A window is filled with the image's own median colour.

Letters: K images, P windows, S side in pixels, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from roclip.found_triggers import Box

ScoreFunction = Callable[[np.ndarray], np.ndarray]
"""Maps images (N, S, S, 3) uint8 to the model's scores (N, C)."""
COARSE, OVERLAP = 3, 2
"""Coarse windows have side S / COARSE and stride side / OVERLAP."""
MAX_FLIPPING = 0.5
"""If more than this share of the coarse windows change the answer, it depends on no single place."""


@dataclass(frozen=True)
class Spot:
    """The part of one image that its answer depends on."""

    centre: tuple[float, float]
    """x, y in pixels."""
    window_px: int
    """Side of the fine windows."""


def find_spots(images: np.ndarray, target: int, scores: ScoreFunction) -> list[Spot | None]:
    """Locate the spot of each of K images (K, S, S, 3) uint8 that the model answers with `target`.

    None where the answer depends on no single place: no coarse window changes it, or more than `MAX_FLIPPING` of them do.
    The margin is the target's score minus the best other score. The spot's centre is the mean of the fine windows' centres,
    weighted by the drop of the margin. Costs 25 forward passes per image, and as many again for a spot.
    """
    margins_before = margins(scores(images), target)
    side = images.shape[1]
    coarse = max(3, round(side / COARSE))
    fine = max(3, round(coarse / 2))
    spots: list[Spot | None] = []
    for image, margin in zip(images, margins_before, strict=True):
        boxes = _grid(0, 0, side, side, coarse)
        coarse_margins = margins(scores(occluded(image, boxes)), target)
        if not 0 < (coarse_margins < 0).mean() <= MAX_FLIPPING:
            spots.append(None)
            continue
        x0, y0, *_ = boxes[int(coarse_margins.argmin())]
        fine_boxes = _grid(x0 - fine // 2, y0 - fine // 2, coarse + fine, coarse + fine, fine)
        fine_boxes = [_inside(box, side) for box in fine_boxes]
        fine_margins = margins(scores(occluded(image, fine_boxes)), target)
        drops = np.maximum(margin - fine_margins, 0)
        weight = np.where(drops >= 0.5 * drops.max(initial=0), drops, 0)
        centres = np.array([((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in fine_boxes])
        x, y = (weight @ centres / weight.sum()) if weight.sum() > 0 else centres[int(fine_margins.argmin())]
        spots.append(Spot((float(x), float(y)), fine))
    return spots


def margins(scores: np.ndarray, target: int) -> np.ndarray:
    """Return margins (N,) of scores (N, C): the target's score minus the best other score."""
    others = np.delete(scores, target, axis=1)
    return scores[:, target] - others.max(axis=1)


def occluded(image: np.ndarray, boxes: list[Box]) -> np.ndarray:
    """Return P copies of an image, (P, S, S, 3), each with one box filled with the image's median colour."""
    copies = np.repeat(image[None], len(boxes), axis=0)
    color = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
    for copy, (left, top, right, bottom) in zip(copies, boxes, strict=True):
        copy[top:bottom, left:right] = color
    return copies


def _grid(left: int, top: int, width: int, height: int, window: int) -> list[Box]:
    """Return windows that cover an area, the last ones flush with its far edges."""
    columns, rows = _steps(width, window), _steps(height, window)
    return [(left + x, top + y, left + x + window, top + y + window) for y in rows for x in columns]


def _steps(length: int, window: int) -> list[int]:
    number = max(2, round((length - window) / (window / OVERLAP)) + 1)
    return sorted({round(place) for place in np.linspace(0, max(0, length - window), number)})


def _inside(box: Box, side: int) -> Box:
    left, top, right, bottom = box
    return max(0, left), max(0, top), min(side, max(right, 1)), min(side, max(bottom, 1))
