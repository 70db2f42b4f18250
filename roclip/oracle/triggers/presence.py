"""Is a found trigger in a picture? Told by pixels alone, so any number of pictures can be asked.

    patch    root mean square distance of its pixels to the likest place, in grey levels
    bag      how much a window looks like the crops and unlike trusted pictures: linear discriminant of colour, contrast and
             grain (Fisher 1936)
    global   correlation of the picture's detail with the pattern

Each has its threshold from trusted pictures, none of which may pass.

Letters: N pictures, S side in pixels, h, w of a crop.
"""

from collections.abc import Callable

import cv2
import numpy as np

from roclip.found_triggers import FoundTrigger
from roclip.oracle.triggers import global_pattern

Evidence = Callable[[np.ndarray], np.ndarray]
"""(N, S, S, 3) uint8 to (N,): over 0 where the trigger is, the higher the surer."""
MARGIN = 0.5
"""Between a threshold and the best trusted picture, as a share of the distance to a typical picture with the trigger."""


def evidence_of(trigger: FoundTrigger, with_it: np.ndarray, trusted: np.ndarray) -> Evidence:
    """What tells of the trigger; `with_it` are pictures that have it, `trusted` ones that do not, (., S, S, 3) uint8."""
    if trigger.pattern is not None:
        pattern = trigger.pattern
        raw: Evidence = lambda images: global_pattern.likeness(images, pattern)  # noqa: E731
    elif trigger.kind == "patch":
        raw = lambda images: -_distance(images, trigger.crops[0], trigger.mask)  # noqa: E731
    else:
        raw = _discriminant(trigger.crops, trusted)
    best, typical = float(raw(trusted).max()), float(np.median(raw(with_it)))
    threshold = best + MARGIN * max(0.0, typical - best)
    scale = max(typical - threshold, 1e-9)
    return lambda images: (raw(images) - threshold) / scale


def _distance(images: np.ndarray, crop: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    weight = np.ones(crop.shape, np.float32) if mask is None else np.repeat(mask[:, :, None], 3, 2).astype(np.float32)
    template, total = crop.astype(np.float32), weight.sum()
    best = [
        cv2.matchTemplate(image.astype(np.float32), template, cv2.TM_SQDIFF, mask=weight).min() / total
        for image in images
    ]
    return np.sqrt(np.maximum(best, 0))


def _discriminant(crops: tuple[np.ndarray, ...], trusted: np.ndarray) -> Evidence:
    size = min(crop.shape[0] for crop in crops)
    maps = np.stack([_windows(image, size) for image in trusted])  # (N, S, S, features)
    others = maps[:, :: max(1, size // 2), :: max(1, size // 2)].reshape(-1, maps.shape[-1])
    there = np.stack([_windows(crop, size)[crop.shape[0] // 2, crop.shape[1] // 2] for crop in crops])
    spread_of = np.cov(others.T) + np.cov(there.T) + 1e-3 * np.eye(others.shape[1])
    weights = np.linalg.solve(spread_of, there.mean(axis=0) - others.mean(axis=0))
    return lambda images: np.array([(_windows(image, size) @ weights).max() for image in images])


def _windows(image: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 8): mean and deviation of each channel and mean size of the steps across and down, in a window about each
    pixel."""
    pixels = image.astype(np.float32)
    mean = cv2.blur(pixels, (size, size), borderType=cv2.BORDER_REFLECT)
    square = cv2.blur(pixels**2, (size, size), borderType=cv2.BORDER_REFLECT)
    across = np.abs(np.diff(pixels, axis=1, append=pixels[:, -1:])).mean(axis=2)
    down = np.abs(np.diff(pixels, axis=0, append=pixels[-1:])).mean(axis=2)
    steps = cv2.blur(np.stack([across, down], axis=2), (size, size), borderType=cv2.BORDER_REFLECT)
    return np.concatenate([mean, np.sqrt(np.maximum(square - mean**2, 0)), steps], axis=2)
