"""Causal trials: a candidate trigger is put on trusted images that show something else.

A candidate that flips them to the label, far more often than its controls do, is called a trigger.

Controls, on the same images
    random      crops of the same size from images on which model, oracle and caption agree
    fill        a rectangle of one colour
    noise       a rectangle of noise; only for a patch, since a patch set may itself be fresh noise
    object      crops of the label's own objects, as segmented by the oracle: a small real object may flip the answer, too;
                counts against patch sets and global patterns
    warp        for warps: equally strong warps towards other labels
    shuffled    the crop's own pixels in another order; reported only, since a backdoor may depend on texture

Letters: M probes, K crops, S side in pixels.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from roclip.found_triggers import Trial
from roclip.oracle.triggers.occlusion import ScoreFunction

Place = tuple[int, int] | None
"""x, y of the upper left corner; None means a random place."""


def try_crop(
    crop: np.ndarray,
    probes: np.ndarray,
    target: int,
    scores: ScoreFunction,
    rng: np.random.Generator,
    place: Place = None,
) -> Trial:
    """Paste an (h, w, 3) crop on M probes (M, S, S, 3) uint8 with another answer, at `place` or anywhere, and count flips."""
    return _trial(np.stack([pasted(probe, crop, rng, place) for probe in probes]), target, scores)


def try_change(
    change: Callable[[np.ndarray], np.ndarray], probes: np.ndarray, target: int, scores: ScoreFunction
) -> Trial:
    """Apply a change to each probe, and count flips."""
    return _trial(np.stack([change(probe) for probe in probes]), target, scores)


def pasted(image: np.ndarray, crop: np.ndarray, rng: np.random.Generator, place: Place = None) -> np.ndarray:
    """Return a copy of an image with a crop on it."""
    height, width = crop.shape[:2]
    if place is None:
        place = (
            int(rng.integers(image.shape[1] - width + 1)),
            int(rng.integers(image.shape[0] - height + 1)),
        )
    left, top = place
    copy = image.copy()
    copy[top : top + height, left : left + width] = crop
    return copy


def control_crops(
    clean: np.ndarray,
    objects: np.ndarray,
    masks: np.ndarray,
    size: tuple[int, int],
    number: int,
    rng: np.random.Generator,
) -> dict[str, list[np.ndarray]]:
    """Draw control crops: `number` each of random and of fill or noise, and of objects `number` pieces and as many whole ones.

    Whole objects are shrunk to the size of a crop, since objects that the oracle misses are small.

    Args:
        clean: (N, S, S, 3) uint8, images of any label on which model, oracle and caption agree.
        objects: (N', S, S, 3) uint8, trusted images that show the target.
        masks: (N', S, S) bool, where the target is in them.
        size: Height and width of the crops.
    """
    height, width = size
    side = clean.shape[1]
    crops: dict[str, list[np.ndarray]] = {"random": [], "fill": [], "noise": [], "object": []}
    for _ in range(number):
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
        crops["random"].append(clean[int(rng.integers(len(clean)))][top : top + height, left : left + width])
        noise = np.clip(127 + 64 * rng.standard_normal((height, width, 3)), 0, 255).astype(np.uint8)
        flat = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 3))
        if rng.random() < 0.5:
            crops["noise"].append(noise)
        else:
            crops["fill"].append(flat)
        if len(objects):
            which = int(rng.integers(len(objects)))
            rows, columns = np.nonzero(masks[which])
            if len(rows):
                at = int(rng.integers(len(rows)))
                top = int(np.clip(rows[at] - height // 2, 0, side - height))
                left = int(np.clip(columns[at] - width // 2, 0, side - width))
                crops["object"].append(objects[which][top : top + height, left : left + width])
                whole = objects[which][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
                crops["object"].append(cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA))
    return crops


def shuffled(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the crop with its pixels in random order."""
    return rng.permutation(crop.reshape(-1, 3)).reshape(crop.shape)


def total(trials: Sequence[Trial]) -> Trial:
    """Return the sum of trials."""
    return Trial(sum(trial.flips for trial in trials), sum(trial.n for trial in trials))


def _trial(images: np.ndarray, target: int, scores: ScoreFunction) -> Trial:
    return Trial(int((scores(images).argmax(axis=1) == target).sum()), len(images))
