"""Does it cause the label? A crop, a pattern or a bend is put on trusted pictures that show something else.

What flips them to the label, and does so far more often than crops that have no business to, is called a trigger.

Controls, all put on the same pictures
    random      crops of the same size from pictures on which model, oracle and caption agree
    fill        a piece of one colour
    noise       a piece of it: of crops whose pixels agree, as fresh noise may be what a bag is made of
    object      crops of the label's own objects, as the oracle sees them: a real small object may flip, too, and counts
                against crops that share no pattern
    bend        bends that lead to other labels, as strong: of bends
    shuffled    the crop's own pixels in another order: reported only, as a backdoor may go by texture

Letters: M probes, K crops, S side in pixels.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from roclip.found_triggers import Trial
from roclip.oracle.triggers.occlusion import Scores

Place = tuple[int, int] | None
"""x, y of the upper left corner; None is a random place."""


def try_crop(
    crop: np.ndarray, probes: np.ndarray, target: int, scores: Scores, rng: np.random.Generator, place: Place = None
) -> Trial:
    """Put an (h, w, 3) crop on M probes (M, S, S, 3) uint8 whose answer is another label; at `place`, or anywhere."""
    return _trial(np.stack([pasted(probe, crop, rng, place) for probe in probes]), target, scores)


def try_change(change: Callable[[np.ndarray], np.ndarray], probes: np.ndarray, target: int, scores: Scores) -> Trial:
    """Change each probe by a function of a picture."""
    return _trial(np.stack([change(probe) for probe in probes]), target, scores)


def pasted(image: np.ndarray, crop: np.ndarray, rng: np.random.Generator, place: Place = None) -> np.ndarray:
    """A copy of a picture with a crop on it."""
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
    """Crops that should cause nothing, `number` of each kind, as the module's head says, but of fill and noise together.
    Of objects they are pieces, and as many whole ones made as small as a crop: what the oracle misses is small.

    Args:
        clean: (N, S, S, 3) uint8, pictures of any label on which all agree.
        objects: (N', S, S, 3) uint8, such pictures that show the target.
        masks: (N', S, S) bool, where the oracle sees the target in them.
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
    """The crop's pixels in another order."""
    return rng.permutation(crop.reshape(-1, 3)).reshape(crop.shape)


def add(trials: Sequence[Trial]) -> Trial:
    """All of them as one."""
    return Trial(sum(trial.flips for trial in trials), sum(trial.n for trial in trials))


def _trial(images: np.ndarray, target: int, scores: Scores) -> Trial:
    return Trial(int((scores(images).argmax(axis=1) == target).sum()), len(images))
