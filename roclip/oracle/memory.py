"""Has the model memorised an image? It is then confident, and the features of images with a trigger form a dense cluster.

An image that the oracle merely misjudges is a hard one, of which the model is not confident either. On one run of the demo, among
images that the oracle contradicts (7 honest, 156 with a patch, 15 targeted), m has an AUROC of 0.99 for patches and 0.91 for
targeted images; the gap alone 0.99 and 0.91, the density alone 0.97 and 0.50. The loss of the caption itself does not help: a
victim often has several captions, each of them learned a little (AUROC 0.05 and 0.16).

    m_i = 1/2 (share of honest images j with i's answer with gap_j < gap_i)
        + 1/2 (share of them with density_j < density_i)

    gap      cosine of the best label minus that of the second best
    density  mean cosine of an image's features with those of its `NEIGHBOURS` nearest others, in a sample of the data

For honest images m is uniform on [0, 1], whatever the model. The density is that of distance-based detectors of poisoned pairs
(arXiv:2502.01385), which apply it to all images; here it is applied only to images that the oracle already contradicts.
"""

import numpy as np

from roclip.oracle.scan.scan import ScanResult

NEIGHBOURS = 16
SAMPLE = 4096
"""Size of the evenly spaced sample in which neighbours are searched."""
HONEST = 256
"""Maximum number of honest images of a label that others are compared with."""


def memorised(scan: ScanResult, rows: np.ndarray) -> np.ndarray:
    """Return m (n,) in [0, 1] of the images `rows` (n,); 0.5 where no honest image has the same answer."""
    seen = scan.observations
    answers = seen.answer[rows]
    found = np.full(len(rows), 0.5)
    honest = (seen.clear & seen.any_named & seen.answer_mask()).any(axis=1)
    sample = _evenly(np.arange(len(seen.answer)), SAMPLE)
    others = scan.features(sample).astype(np.float32)
    for answer in np.unique(answers):
        compared = _evenly(np.flatnonzero(honest & (seen.answer == answer)), HONEST)
        if not len(compared):
            continue
        queried = rows[answers == answer]
        gaps = [_gap(scan.scores[each]) for each in (queried, compared)]
        densities = [_density(scan.features(each), each, others, sample) for each in (queried, compared)]
        found[answers == answer] = (_share_below(*gaps) + _share_below(*densities)) / 2
    return found


def _gap(scores: np.ndarray) -> np.ndarray:
    return scores[:, 0] - scores[:, 1] if scores.shape[1] > 1 else np.zeros(len(scores))


def _density(features: np.ndarray, rows: np.ndarray, others: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Return densities (n,) of features (n, D), not counting an image as its own neighbour."""
    cosines = features.astype(np.float32) @ others.T
    cosines[rows[:, None] == sample] = -1
    count = min(NEIGHBOURS, len(sample))
    return np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)


def _share_below(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(among), values) / len(among)


def _evenly(rows: np.ndarray, number: int) -> np.ndarray:
    """Return at most `number` of the rows, evenly spaced."""
    return rows if len(rows) <= number else rows[np.linspace(0, len(rows) - 1, number).astype(np.int64)]
