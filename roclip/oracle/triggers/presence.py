"""Detects a found trigger in images from their pixels alone.

Each kind of trigger scores an image (`FoundTrigger.presence_score`). The threshold lies above the score of every trusted
image, so no trusted image is reported.
"""

from collections.abc import Callable

import numpy as np

from roclip.found_triggers import FoundTrigger

Detector = Callable[[np.ndarray], np.ndarray]
"""Maps images (N, S, S, 3) uint8 to evidence (N,): above 0 where the trigger is present, higher for more certainty."""
MARGIN = 0.5
"""Threshold above the best trusted image, as a share of its distance to the median image with the trigger."""


def trigger_detector(trigger: FoundTrigger, with_trigger: np.ndarray, trusted: np.ndarray) -> Detector | None:
    """Return a detector calibrated on images with the trigger and on trusted ones without it, (., S, S, 3) uint8.

    Returns None for a kind that pixels do not show. Evidence is (score - t) / (median score with the trigger - t), where t
    is the threshold.
    """
    score = trigger.presence_score(trusted)
    if score is None:
        return None
    best, typical = float(score(trusted).max()), float(np.median(score(with_trigger)))
    threshold = best + MARGIN * max(0.0, typical - best)
    scale = max(typical - threshold, 1e-9)
    return lambda images: (score(images) - threshold) / scale
