"""What the check has found: triggers that cause a label, ready to be put on other pictures.

Letters: S side in pixels at which pictures are looked at; h, w of a crop.
"""

from dataclasses import dataclass

import numpy as np

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive"""


@dataclass(frozen=True)
class Source:
    """A picture that a trigger was taken from."""

    image: int
    """Number of the distinct image in the pass."""
    box: Box


@dataclass(frozen=True)
class Trial:
    """How often a thing that was put on trusted pictures of other labels made the model answer `target`."""

    flips: int
    n: int

    @property
    def rate(self) -> float:
        return self.flips / self.n if self.n else 0.0


@dataclass(frozen=True)
class FoundTrigger:
    """A trigger that was shown to cause its label.

    `kind` is "patch" (crops whose pixels agree), "bag" (crops whose pixels do not: fresh noise; any of them works) or "global"
    (a pattern over the whole picture).
    """

    target: str
    kind: str
    crops: tuple[np.ndarray, ...] = ()
    """(h, w, 3) uint8 each, the strongest first; none of a global trigger."""
    pattern: np.ndarray | None = None
    """(S, S, 3) float32: what a global trigger adds to a picture, in grey levels."""
    sources: tuple[Source, ...] = ()
    """Where the crops were found, in the order of `crops`."""
    pasted: Trial = Trial(0, 0)
    """Of the crops, or of the pattern, on trusted pictures that do not show the target."""
    control: Trial = Trial(0, 0)
    """The best of the controls."""

    def put_on(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
        """A copy of an (S, S, 3) uint8 image with the trigger on it, and the box that changed."""
        side = image.shape[0]
        if self.pattern is not None:
            changed = image.astype(np.float32) + self.pattern
            return np.clip(np.rint(changed), 0, 255).astype(np.uint8), (0, 0, image.shape[1], side)
        crop = self.crops[int(rng.integers(len(self.crops)))]
        height, width = crop.shape[:2]
        top, left = int(rng.integers(side - height + 1)), int(rng.integers(image.shape[1] - width + 1))
        stamped = image.copy()
        stamped[top : top + height, left : left + width] = crop
        return stamped, (left, top, left + width, top + height)
