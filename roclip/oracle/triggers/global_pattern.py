"""Triggers without a place: a pattern that lies over the whole picture.

    mean residual   what suspects have in common beyond other pictures: the mean of their high-passed pixels, less that of
                    others. A blended image or a wave adds up; what the pictures show does not.
    proof           the residual, at several strengths, on trusted pictures; controls: the residuals of as many other
                    pictures, and of honest ones of the label, which on plain backgrounds is a ghost of what it looks like

Letters: N suspects, S side in pixels.
"""

from collections.abc import Callable

import cv2
import numpy as np

from roclip.found_triggers import Trial
from roclip.oracle.triggers.occlusion import Scores
from roclip.oracle.triggers.paste import try_change

STRENGTHS = (1.0, 2.0, 3.0)
"""Of the pattern, as multiples of the residual."""
MIN_SUSPECTS = 12


def residual(suspects: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N, S, S, 3) uint8 and as many or more of others to (S, S, 3) float32 in grey levels: mean high-passed difference."""
    return _mean_detail(suspects) - _mean_detail(others)


def try_residual(pattern: np.ndarray, probes: np.ndarray, target: int, scores: Scores) -> tuple[float, Trial]:
    """The weakest strength at which the pattern flips most of what any strength flips, and its trial there."""
    trials = [(strength, try_change(added(strength * pattern), probes, target, scores)) for strength in STRENGTHS]
    most = max(trial.rate for _, trial in trials)
    return next((strength, trial) for strength, trial in trials if trial.rate >= 0.9 * most)


def added(pattern: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that adds the pattern to a picture."""
    return lambda image: np.clip(np.rint(image + pattern), 0, 255).astype(np.uint8)


def likeness(images: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """(N,): correlation of each picture's detail with the pattern."""
    flat = pattern.ravel() / max(float(np.linalg.norm(pattern)), 1e-9)
    details = np.stack([_detail(image).ravel() for image in images])
    return details @ flat / np.maximum(np.linalg.norm(details, axis=1), 1e-9)


def _mean_detail(images: np.ndarray) -> np.ndarray:
    total = np.zeros(images.shape[1:], dtype=np.float64)
    for image in images:
        total += _detail(image)
    return (total / max(1, len(images))).astype(np.float32)


def _detail(image: np.ndarray) -> np.ndarray:
    pixels = image.astype(np.float32)
    return pixels - cv2.GaussianBlur(pixels, (0, 0), sigmaX=image.shape[0] / 8)
