import torch

from roclip.gate import AgreementGate

VALID = torch.ones(4, dtype=torch.bool)
IDS = torch.tensor([10, 11, 12, 13])


def test_least_agreeing_share_sits_out():
    gate = AgreementGate(0.0)
    assert gate.keep(torch.tensor([0.9, 0.1, 0.5, 0.3]), IDS, VALID, 0.5).tolist() == [True, False, True, False]
    assert gate.scores == {10: 1.0, 11: 0.0, 12: 2 / 3, 13: 1 / 3}


def test_unreadable_pairs_are_neither_ranked_nor_kept():
    gate = AgreementGate(0.0)
    keep = gate.keep(torch.tensor([0.9, -1.0, 0.5, 0.3]), IDS, torch.tensor([True, False, True, True]), 0.34)
    assert keep.tolist() == [True, False, True, False]
    assert set(gate.scores) == {10, 12, 13}


def test_what_was_suspected_is_not_forgiven_at_once():
    gate = AgreementGate(0.8)
    gate.keep(torch.tensor([0.0, 0.4, 0.6, 0.8]), IDS, VALID, 0.25)
    assert gate.keep(torch.tensor([0.9, 0.4, 0.6, 0.8]), IDS, VALID, 0.25).tolist() == [False, True, True, True]
    for _ in range(10):
        keep = gate.keep(torch.tensor([0.9, 0.4, 0.6, 0.8]), IDS, VALID, 0.25)
    assert keep.tolist() == [True, False, True, True]


def test_ties_and_a_share_of_nothing():
    gate = AgreementGate(0.0)
    assert gate.keep(torch.zeros(4), IDS, VALID, 0.5).tolist() == [False, False, True, True]
    assert AgreementGate(0.0).keep(torch.zeros(4), IDS, VALID, 0.2).tolist() == [True] * 4


def test_scores_survive_a_checkpoint():
    gate, other = AgreementGate(0.8), AgreementGate(0.8)
    gate.keep(torch.tensor([0.9, 0.1, 0.5, 0.3]), IDS, VALID, 0.5)
    other.load_state_dict(gate.state_dict())
    assert other.scores == gate.scores
