"""How well scores separate the samples that are meant from all others, such as poisons from honest pairs."""

import math

import numpy as np
from scipy.stats import rankdata


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher; ties count half (Mann and Whitney).

    Args:
        scores: (N,), the higher, the more positive.
        positive: (N,) bool; both kinds must be there.
    """
    hits, ranks = int(positive.sum()), rankdata(scores)
    above = ranks[positive].sum() - hits * (hits + 1) / 2
    return float(above / (hits * (len(scores) - hits)))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """sum_n (R_n - R_(n-1)) P_n over the thresholds from the highest, R recall and P precision; tied scores share a threshold.

    Args:
        scores: (N,), the higher, the more positive.
        positive: (N,) bool; a positive must be there.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    found = np.cumsum(positive[order])[ends]
    recalls = found / positive.sum()
    return float((np.diff(recalls, prepend=0.0) * found / (ends + 1)).sum())


def fpr_at_tpr(scores: np.ndarray, positive: np.ndarray, tpr: float) -> float:
    """Share of the negatives that score at least the highest threshold which a share of `tpr` of the positives reaches.

    It is what it costs to find that share: CASCADE (arXiv:2608.04052) reports it at a TPR of 1.

    Args:
        scores: (N,), the higher, the more positive.
        positive: (N,) bool; both kinds must be there.
        tpr: Above 0, at most 1.
    """
    ordered = np.sort(scores[positive])[::-1]
    threshold = ordered[math.ceil(tpr * len(ordered)) - 1]
    return float((scores[~positive] >= threshold).mean())
