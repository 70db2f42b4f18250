"""Zero-shot accuracy and trigger success of a model on held-out trusted images.

Letters: R trusted images, C labels, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roclip.found_triggers import FoundTrigger, Trial
from roclip.model.towers import Encoder
from roclip.oracle.held_out import load_held_out
from roclip.oracle.segmenters.base import Segmenter


@dataclass(frozen=True)
class TrustedMeasure:
    """The measurements of one model."""

    top1: Trial
    """Images whose zero-shot label is one that they show."""
    flips: tuple[Trial, ...]
    """For each trigger: among images that neither show nor are given its target, those that it flips to the target."""


class TrustedEvaluation:
    """Held-out trusted images, plain and with each trigger, which has the same place for every model."""

    def __init__(
        self,
        trusted: Path,
        segmenter: Segmenter,
        labels: Sequence[str],
        templates: Sequence[str],
        found: Sequence[FoundTrigger],
        size_px: int,
        seed: int,
    ):
        """`size_px` is the image side of the scan that found the triggers. Raises `DataError` for unreadable trusted images."""
        self.labels, self.templates, self.found = list(labels), list(templates), found
        held_out = load_held_out(segmenter, trusted, labels, size_px)
        self.images, self.shows = held_out.images, held_out.shows
        self.stamped = [
            np.stack(
                [trigger.apply(image, np.random.default_rng((seed, 82, n)))[0] for n, image in enumerate(self.images)]
            )
            for trigger in found
        ]

    def measure(self, encoder: Encoder) -> TrustedMeasure:
        """Measure a model: one forward pass per image, and one more per trigger."""
        plain, flips = self._answers(encoder, self.images), []
        for trigger, images in zip(self.found, self.stamped, strict=True):
            target = self.labels.index(trigger.target)
            others = ~self.shows[:, target] & (plain != target)
            flips.append(Trial(int((self._answers(encoder, images)[others] == target).sum()), int(others.sum())))
        right = self.shows[np.arange(len(plain)), plain]
        return TrustedMeasure(Trial(int(right.sum()), len(right)), tuple(flips))

    def label_rate(self, encoder: Encoder, images: np.ndarray, targets: Sequence[str]) -> Trial:
        """Count the images (n, S, S, 3) uint8 whose zero-shot label equals their target."""
        wanted = np.array([self.labels.index(target) for target in targets], dtype=np.int64)
        return Trial(int((self._answers(encoder, images) == wanted).sum()), len(wanted))

    def _answers(self, encoder: Encoder, images: np.ndarray) -> np.ndarray:
        if not len(images):
            return np.empty(0, dtype=np.int64)
        return (encoder.images(images) @ encoder.classifier(self.labels, self.templates).T).argmax(dim=1).numpy()
