import pytest
import torch

from roclip.defence.sample_filter import SampleFilter
from roclip.defence.suspicion_model import SuspicionModel

VALID = torch.ones(4, dtype=torch.bool)
IDS = torch.tensor([10, 11, 12, 13])
IMAGES = torch.arange(4 * 3 * 8 * 8).remainder(251).view(4, 3, 8, 8).to(torch.uint8)


def test_least_agreeing_share_is_suspected():
    sample_filter = SampleFilter(0.0)
    assert sample_filter.suspects([torch.tensor([0.9, 0.1, 0.5, 0.3])], IDS, VALID, IMAGES, 0.5).tolist() == [
        False,
        True,
        False,
        True,
    ]
    running = list(sample_filter.running_scores.values())
    assert running == [1.0, 0.0, 2 / 3, 1 / 3]
    assert sample_filter.scores == pytest.approx({10 + n: (1 - s) ** 3 for n, s in enumerate(running)})


def test_unreadable_pairs_are_neither_ranked_nor_suspected():
    sample_filter = SampleFilter(0.0)
    suspected = sample_filter.suspects(
        [torch.tensor([0.9, -1.0, 0.5, 0.3])], IDS, torch.tensor([True, False, True, True]), IMAGES, 0.34
    )
    assert suspected.tolist() == [False, False, False, True]
    assert set(sample_filter.scores) == {10, 12, 13}


def test_what_was_suspected_is_not_forgiven_at_once():
    sample_filter = SampleFilter(0.8)
    sample_filter.suspects([torch.tensor([0.0, 0.4, 0.6, 0.8])], IDS, VALID, IMAGES, 0.25)
    assert sample_filter.suspects([torch.tensor([0.9, 0.4, 0.6, 0.8])], IDS, VALID, IMAGES, 0.25).tolist() == [
        True,
        False,
        False,
        False,
    ]
    for _ in range(10):
        suspected = sample_filter.suspects([torch.tensor([0.9, 0.4, 0.6, 0.8])], IDS, VALID, IMAGES, 0.25)
    assert suspected.tolist() == [False, True, False, False]


def test_an_image_with_many_captions_is_judged_by_all_of_them():
    sample_filter, images = SampleFilter(0.5), IMAGES.clone()
    images[1] = images[2] = images[0]
    suspected = sample_filter.suspects([torch.tensor([0.1, 0.2, 0.9, 0.5])], IDS, VALID, images, 0.75)
    assert suspected.tolist() == [True, True, True, False]
    assert list(sample_filter.copies.values()) == [3, 1]
    judged = (1 - next(iter(sample_filter.running_scores.values()))) ** 3
    assert sample_filter.scores[10] == pytest.approx(1 - (1 - judged) / 3**0.5)
    assert len(sample_filter.scores) == 4


def test_ties_and_a_share_of_nothing():
    sample_filter = SampleFilter(0.0)
    assert sample_filter.suspects([torch.zeros(4)], IDS, VALID, IMAGES, 0.5).tolist() == [True, True, False, False]
    assert SampleFilter(0.0).suspects([torch.zeros(4)], IDS, VALID, IMAGES, 0.2).tolist() == [False] * 4


def test_agreements_are_averaged_by_rank():
    first, second = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.tensor([70.0, 30.0, 10.0, 50.0])
    sample_filter = SampleFilter(0.0)
    sample_filter.suspects([first, second], IDS, VALID, IMAGES, 0.25)
    assert list(sample_filter.running_scores.values()) == [1.0, 1 / 6, 2 / 6, 3 / 6]


def test_pairs_whose_images_share_a_trigger_are_suspected_even_where_their_own_agreement_is_good():
    torch.manual_seed(0)
    trigger = torch.tensor([0, 255]).repeat(8).view(4, 4).to(torch.uint8)
    valid = torch.ones(64, dtype=torch.bool)
    ranks_alone, sample_filter = SampleFilter(0.0), SampleFilter(0.0, SuspicionModel(16))
    for visit in range(60):
        ids = torch.arange(64) + 64 * visit
        images = torch.randint(60, 200, (64, 3, 16, 16), dtype=torch.uint8)
        images[:8, :, 2:6, 2:6] = trigger
        agreement = torch.rand(64)
        agreement[:7] *= 0.2
        agreement[7] = 0.6  # one that no agreement gives away
        alone = ranks_alone.suspects([agreement], ids, valid, images, 0.25)
        together = sample_filter.suspects([agreement], ids, valid, images, 0.25)
    assert not alone[7]
    assert together[:8].all()


def test_scores_survive_a_checkpoint():
    sample_filter, other = SampleFilter(0.8, SuspicionModel(8)), SampleFilter(0.8, SuspicionModel(8, seed=1))
    agreement, images = torch.tensor([0.9, 0.1, 0.5, 0.3]), torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    sample_filter.suspects([agreement], IDS, VALID, images, 0.5)
    other.load_state_dict(sample_filter.state_dict())
    assert (other.running_scores, other.scores) == (sample_filter.running_scores, sample_filter.scores)
    for each in (sample_filter, other):
        each.suspects([agreement.flip(0)], IDS, VALID, images, 0.5)
    assert other.scores == sample_filter.scores
