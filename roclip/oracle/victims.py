"""Whose captions taught the trigger: each sample of the data that a finding explains, and how sure that is.

    trigger     a caption names the target, and the trigger is in the image; score 1 + evidence
    lie         the model repeats what only the caption says, more often than chance explains once the images with a
                trigger are set aside; score between 0 and 1: half of it is what else the image shows, half whether
                the model knows it by heart (memory.py)
    copies      the same of images that came with several captions. If all of those are lies that the oracle can judge, but
                for as many as it should miss, then so are those that it holds for possible or is blind to

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
"""Of the victims, honest copies that may be expected among them."""


@dataclass(frozen=True)
class Victims:
    """All (N,)."""

    score: np.ndarray
    """Over 0 for victims, the surer the higher; 0 for the rest."""
    target: np.ndarray
    """Label that the image was made to mean; -1 for the rest."""
    trigger: np.ndarray
    """Number of the trigger among all found; -1 where none is in the picture."""

    @property
    def named(self) -> np.ndarray:
        """(N,) bool."""
        return self.score > 0


def find_victims(
    scan: ScanResult,
    reference: Observations,
    covered: Sequence[int],
    searches: Sequence[Search],
    read: Callable[[np.ndarray], np.ndarray],
    alpha: float,
) -> Victims:
    """Name the victims. `read` gives images (n, S, S, 3) uint8 by their numbers (n,)."""
    seen = scan.observations
    victims = Victims(np.zeros(len(seen.answer)), np.full(len(seen.answer), -1), np.full(len(seen.answer), -1))
    named, first = seen.any_named, 0
    for search in searches:
        for number, detect in enumerate(search.detectors, first):
            for rows in _batches(np.flatnonzero(named[:, search.target])):
                evidence = detect(read(rows))
                there = (evidence > 0) & (1 + evidence > victims.score[rows])
                victims.score[rows[there]] = 1 + evidence[there]
                victims.target[rows[there]], victims.trigger[rows[there]] = search.target, number
        first += len(search.triggers)
    _unexplained(scan, reference, covered, victims, alpha)
    return victims


def _unexplained(
    scan: ScanResult, reference: Observations, covered: Sequence[int], victims: Victims, alpha: float
) -> None:
    """Add repeated lies of labels, and of copied images, that the triggers leave significant."""
    seen, rest = scan.observations, ~victims.named
    findings = statistics.run_tests(seen.only(rest), reference, covered)
    repeated = seen.lies() & seen.says() & rest[:, None]
    told = [c for c, test in findings.lies.items() if statistics.repeats(test, alpha)]
    lied = np.zeros_like(repeated)
    lied[:, told] = repeated[:, told]
    if statistics.repeats_copies(findings.copied, alpha):
        tested = np.isin(np.arange(lied.shape[1]), list(findings.lies))
        copied = seen.any_named & seen.says() & (rest & (seen.captions > 1))[:, None]
        lied |= repeated & tested & copied
        if (
            _honest_copies(copied, repeated & copied, tested, reference)
            <= MAX_WRONG * (victims.named | lied.any(axis=1)).sum()
        ):
            lied |= copied
    rows = np.flatnonzero(lied.any(axis=1))
    # How much more of the image is something else than what its caption claims.
    other = (scan.areas * seen.clear).max(axis=1, initial=0)
    claimed = (scan.areas * lied).max(axis=1, initial=0)
    shown = 0.5 + 0.5 * (other - claimed)[rows]
    victims.score[rows] = np.clip((shown + memorised(scan, rows)) / 2, 0.01, 1)
    victims.target[rows] = lied[rows].argmax(axis=1)


def _honest_copies(copied: np.ndarray, lied: np.ndarray, tested: np.ndarray, reference: Observations) -> float:
    """How many honest images are to be expected among those whose captions the model repeats (N, C), with the lies (N, C) among
    them and the labels (C,) that the oracle can judge.

        H = max(0, judged - lies / q),  and the same share of those that it cannot judge

    q is the share of lies that it contradicts: of trusted images with labels that they do not show.
    """
    lies = (lied & tested).any(axis=1).sum()
    judged = (copied & tested).any(axis=1).sum()
    q = reference.contradicts()[~reference.any_named & tested].mean()
    honest = max(0.0, judged - lies / max(q, 1e-9))
    return honest + (copied.any(axis=1).sum() - judged) * honest / max(judged, 1)


def affected(scan: ScanResult, victims: Victims, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """By target label: what the oracle sees in its victims, with counts, the most frequent first."""
    counts: dict[str, dict[str, int]] = {}
    for target in np.unique(victims.target[victims.named]):
        clear = scan.observations.clear[victims.named & (victims.target == target)].sum(axis=0)
        order = [c for c in np.argsort(-clear, kind="stable") if clear[c]]
        counts[str(labels[int(target)])] = {str(labels[int(c)]): int(clear[c]) for c in order}
    return counts


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
