import math

import pytest
import torch

from roclip.defence.diagnostics import diagnostics
from roclip.defence.pool import CaptionPool, Match
from roclip.metrics.registry import METRICS


@pytest.fixture
def pool() -> CaptionPool:
    """Four captions: samples 10 and 11 came at step 3, samples 12 and 13 at step 5."""
    pool = CaptionPool(6, 4)
    pool.enqueue(torch.eye(4)[:2], torch.tensor([10, 11]), step=3)
    pool.enqueue(torch.eye(4)[2:], torch.tensor([12, 13]), step=5)
    return pool


def match(similarity: list[float], slots: list[int]) -> Match:
    return Match(torch.zeros(len(slots), 4), torch.tensor(similarity), torch.tensor(slots))


def test_numbers_of_a_step_are_those_worked_out_by_hand(pool):
    found = match([0.0, 0.5, 1.0, 0.25, 0.75], [0, 0, 1, 2, 0])
    values = diagnostics(pool, found, torch.tensor([10, 20, 11, 21, 22]), step=7)
    assert values == pytest.approx(
        {
            "pool_similarity": 0.5,
            "pool_similarity_p10": 0.1,
            "pool_similarity_p50": 0.5,
            "pool_similarity_p90": 0.9,
            "pool_own": 2 / 5,
            "pool_duplicates": 2 / 5,
            "pool_staleness": (4 * 4 + 2) / 5,
            "pool_entropy": -(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)),
        }
    )
    assert set(values) <= set(METRICS)


def test_poisons_that_met_a_caption_with_their_aim_are_counted(pool):
    truth = {10: "patch cat", 12: "patch cat", 13: "text dog", 20: "patch cat", 21: "text dog", 22: "text dog"}
    found = match([0.5] * 5, [2, 2, 1, 3, 3])
    values = diagnostics(pool, found, torch.tensor([20, 21, 22, 22, 30]), step=7, poisons=truth)
    assert (values["poisons_seen"], values["poisons_met"]) == (4, 2)
    assert set(values) <= set(METRICS)


def test_pairs_that_are_not_valid_do_not_count(pool):
    found, ids = match([0.5, 0.1], [0, 1]), torch.tensor([10, 20])
    values = diagnostics(pool, found, ids, step=3, valid=torch.tensor([True, False]))
    assert (values["pool_own"], values["pool_similarity"], values["pool_entropy"]) == (1, 0.5, 0)
    assert diagnostics(pool, found, ids, step=3, valid=torch.zeros(2, dtype=torch.bool)) == {}
