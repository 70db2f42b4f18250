"""Figures of a ranking equal their definitions, with ties."""

from itertools import product

import numpy as np
import pytest

from roclip.evaluation.ranking import auroc, average_precision, fpr_at_tpr


def rankings():
    """Scores with many ties, and which of them are positive."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
        positive[:2] = (True, False)
        yield scores, positive


def test_auroc_is_the_share_of_pairs_in_order():
    for scores, positive in rankings():
        pairs = [(a > b) + 0.5 * (a == b) for a, b in product(scores[positive], scores[~positive])]
        assert auroc(scores, positive) == pytest.approx(np.mean(pairs))


def test_average_precision_is_the_sum_over_thresholds():
    for scores, positive in rankings():
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            chosen = scores >= threshold
            recall = (positive & chosen).sum() / positive.sum()
            area += (recall - before) * (positive & chosen).sum() / chosen.sum()
            before = recall
        assert average_precision(scores, positive) == pytest.approx(area)


def test_average_precision_is_that_of_the_ranking():
    scores, real = np.array([0.9, 0.8, 0.7, 0.0, 0.0]), np.array([True, False, True, True, False])
    # 1/1 and 2/3 where the first two stand; the third ties with another behind them: 3 of 5
    assert average_precision(scores, real) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
def test_fpr_at_tpr_is_the_lowest_of_all_thresholds_that_reach_it(tpr):
    for scores, positive in rankings():
        reached = [t for t in set(scores) if (scores[positive] >= t).mean() >= tpr]
        assert fpr_at_tpr(scores, positive, tpr) == min((scores[~positive] >= t).mean() for t in reached)
