import torch

from roclip.gate import AgreementGate

VALID = torch.ones(4, dtype=torch.bool)
IDS = torch.tensor([10, 11, 12, 13])


def test_least_agreeing_share_is_suspected():
    gate = AgreementGate(0.0)
    assert gate.suspects([torch.tensor([0.9, 0.1, 0.5, 0.3])], IDS, VALID, 0.5).tolist() == [False, True, False, True]
    assert gate.scores == {10: 1.0, 11: 0.0, 12: 2 / 3, 13: 1 / 3}


def test_unreadable_pairs_are_neither_ranked_nor_suspected():
    gate = AgreementGate(0.0)
    suspected = gate.suspects([torch.tensor([0.9, -1.0, 0.5, 0.3])], IDS, torch.tensor([True, False, True, True]), 0.34)
    assert suspected.tolist() == [False, False, False, True]
    assert set(gate.scores) == {10, 12, 13}


def test_what_was_suspected_is_not_forgiven_at_once():
    gate = AgreementGate(0.8)
    gate.suspects([torch.tensor([0.0, 0.4, 0.6, 0.8])], IDS, VALID, 0.25)
    assert gate.suspects([torch.tensor([0.9, 0.4, 0.6, 0.8])], IDS, VALID, 0.25).tolist() == [True, False, False, False]
    for _ in range(10):
        suspected = gate.suspects([torch.tensor([0.9, 0.4, 0.6, 0.8])], IDS, VALID, 0.25)
    assert suspected.tolist() == [False, True, False, False]


def test_ties_and_a_share_of_nothing():
    gate = AgreementGate(0.0)
    assert gate.suspects([torch.zeros(4)], IDS, VALID, 0.5).tolist() == [True, True, False, False]
    assert AgreementGate(0.0).suspects([torch.zeros(4)], IDS, VALID, 0.2).tolist() == [False] * 4


def test_judges_are_averaged_by_rank():
    first, second = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.tensor([70.0, 30.0, 10.0, 50.0])
    gate = AgreementGate(0.0)
    gate.suspects([first, second], IDS, VALID, 0.25)
    assert gate.scores == {10: 1.0, 11: 1 / 6, 12: 2 / 6, 13: 3 / 6}


def test_scores_survive_a_checkpoint():
    gate, other = AgreementGate(0.8), AgreementGate(0.8)
    gate.suspects([torch.tensor([0.9, 0.1, 0.5, 0.3])], IDS, VALID, 0.5)
    other.load_state_dict(gate.state_dict())
    assert other.scores == gate.scores
