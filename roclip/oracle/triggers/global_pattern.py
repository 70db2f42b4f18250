"""Triggers that add a pattern to the whole image.

    residual    r = mean over suspects of HP(x) - mean over other images of HP(x), with HP the image minus its blur. A blended
                image or a sinusoid adds up in r; the content of the images averages out.
    proof       s r on trusted images, at several strengths s; controls are the residuals of as many other images, and of honest
                images of the label, whose residual on plain backgrounds is a ghost of the object

Letters: N suspects, S side in pixels.
"""

import numpy as np

from roclip.found_triggers import Trial, add_pattern, high_pass
from roclip.oracle.triggers.occlusion import ScoreFunction
from roclip.oracle.triggers.paste import try_change

STRENGTHS = (1.0, 2.0, 3.0)
"""Strengths of the pattern, as multiples of the residual."""
MIN_SUSPECTS = 12


def residual(suspects: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the mean high-passed difference (S, S, 3) float32, in grey levels, of suspects and other images (., S, S, 3)."""
    return _mean_high_pass(suspects) - _mean_high_pass(others)


def try_residual(pattern: np.ndarray, probes: np.ndarray, target: int, scores: ScoreFunction) -> tuple[float, Trial]:
    """Return the weakest strength with at least 0.9 of the best strength's flip rate, and its trial."""
    trials = [
        (strength, try_change(lambda image, s=strength: add_pattern(image, s * pattern), probes, target, scores))
        for strength in STRENGTHS
    ]
    most = max(trial.rate for _, trial in trials)
    return next((strength, trial) for strength, trial in trials if trial.rate >= 0.9 * most)


def _mean_high_pass(images: np.ndarray) -> np.ndarray:
    total = np.zeros(images.shape[1:], dtype=np.float64)
    for image in images:
        total += high_pass(image)
    return (total / max(1, len(images))).astype(np.float32)
