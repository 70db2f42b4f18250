"""Names the victims: the samples that taught the model a finding, each with a score of certainty.

    trigger     a caption names the target, and the image carries the trigger; score 1 + evidence
    lie         the model repeats a lie about a label for which this is more frequent than chance explains, even without the
                images that carry a trigger; score in (0, 1], the mean of how much of the image shows another label and of
                whether the model has memorised it (memory.py)
    copies      the same for images with several captions. If the lies among these that the oracle can judge account for all of
                them, up to the oracle's misses, then the ones that it cannot judge are named, too

Letters: N distinct images, C labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from roclip.oracle import statistics
from roclip.oracle.memory import memorised
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.statistics import Observations
from roclip.oracle.triggers.search import Search

BATCH = 512
MAX_WRONG = 0.05
"""Maximum share of honest images expected among the victims for naming unjudged copies."""


@dataclass(frozen=True)
class Victims:
    """The victims; all arrays are (N,)."""

    score: np.ndarray
    """Above 0 for victims, higher for more certainty; 0 for the rest."""
    target: np.ndarray
    """Label that the victim was made to mean; -1 for the rest."""
    trigger: np.ndarray
    """Number of the found trigger that the image carries; -1 without one."""

    @property
    def named(self) -> np.ndarray:
        """(N,) bool: the victims."""
        return self.score > 0


def find_victims(
    scan: ScanResult,
    reference: Observations,
    covered: Sequence[int],
    searches: Sequence[Search],
    read: Callable[[np.ndarray], np.ndarray],
    alpha: float,
) -> Victims:
    """Name the victims. `read` maps numbers (n,) to images (n, S, S, 3) uint8."""
    seen = scan.observations
    victims = Victims(np.zeros(len(seen.answer)), np.full(len(seen.answer), -1), np.full(len(seen.answer), -1))
    named, first = seen.any_named, 0
    for search in searches:
        for number, detect in enumerate(search.detectors, first):
            for rows in _batches(np.flatnonzero(named[:, search.target])):
                evidence = detect(read(rows))
                present = (evidence > 0) & (1 + evidence > victims.score[rows])
                victims.score[rows[present]] = 1 + evidence[present]
                victims.target[rows[present]], victims.trigger[rows[present]] = search.target, number
        first += len(search.triggers)
    _add_unexplained(scan, reference, covered, victims, alpha)
    return victims


def _add_unexplained(
    scan: ScanResult, reference: Observations, covered: Sequence[int], victims: Victims, alpha: float
) -> None:
    """Add repeated lies of labels, and of images with several captions, that are significant without the triggers."""
    seen, rest = scan.observations, ~victims.named
    findings = statistics.run_tests(seen.subset(rest), reference, covered)
    repeated = seen.lies() & seen.answer_mask() & rest[:, None]
    flagged = [c for c, test in findings.lies.items() if statistics.repeats(test, alpha)]
    significant = np.zeros_like(repeated)
    significant[:, flagged] = repeated[:, flagged]
    if statistics.repeats_copies(findings.copied, alpha):
        tested = np.isin(np.arange(significant.shape[1]), list(findings.lies))
        copied = seen.any_named & seen.answer_mask() & (rest & (seen.captions > 1))[:, None]
        significant |= repeated & tested & copied
        if (
            _honest_copies(copied, repeated & copied, tested, reference)
            <= MAX_WRONG * (victims.named | significant.any(axis=1)).sum()
        ):
            significant |= copied
    rows = np.flatnonzero(significant.any(axis=1))
    # Area of the largest clear label minus that of the label that the caption claims.
    other = (scan.areas * seen.clear).max(axis=1, initial=0)
    claimed = (scan.areas * significant).max(axis=1, initial=0)
    shown = 0.5 + 0.5 * (other - claimed)[rows]
    victims.score[rows] = np.clip((shown + memorised(scan, rows)) / 2, 0.01, 1)
    victims.target[rows] = significant[rows].argmax(axis=1)


def _honest_copies(copied: np.ndarray, repeated_lies: np.ndarray, tested: np.ndarray, reference: Observations) -> float:
    """Return the expected number of honest images among those whose captions the model repeats.

        H = max(0, judged - lies / q) for the labels that the oracle can judge, and the same share of the others

    q is the share of lies that the oracle contradicts, measured on trusted images with labels that they do not show.

    Args:
        copied: (N, C) bool, the repeated captions of images with several.
        repeated_lies: (N, C) bool, the lies among them.
        tested: (C,) bool, the labels that the oracle can judge.
    """
    lies = (repeated_lies & tested).any(axis=1).sum()
    judged = (copied & tested).any(axis=1).sum()
    q = reference.contradicts()[~reference.any_named & tested].mean()
    honest = max(0.0, judged - lies / max(q, 1e-9))
    return honest + (copied.any(axis=1).sum() - judged) * honest / max(judged, 1)


def affected(scan: ScanResult, victims: Victims, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return for each target label how often the oracle clearly finds each label in its victims, most frequent first."""
    counts: dict[str, dict[str, int]] = {}
    for target in np.unique(victims.target[victims.named]):
        clear = scan.observations.clear[victims.named & (victims.target == target)].sum(axis=0)
        order = [c for c in np.argsort(-clear, kind="stable") if clear[c]]
        counts[str(labels[int(target)])] = {str(labels[int(c)]): int(clear[c]) for c in order}
    return counts


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
