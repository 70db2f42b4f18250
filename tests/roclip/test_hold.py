"""Holding a tower where it was: the views of a batch, and the loss that they give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kit import TINY_MODEL

from roclip.found import FoundTrigger, save_found
from roclip.hold import STAMPED_WEIGHT, VIEWS, Hold, mixture, stamp
from roclip.model import Towers
from roclip.stream import Batch

SIDE, ROWS = 64, 6
RED = FoundTrigger("ring", "patch", crops=(np.full((5, 5, 3), (255, 0, 0), dtype=np.uint8),))


@pytest.fixture
def towers(tmp_path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    torch.manual_seed(0)
    return Towers("tiny", tmp_path / "tiny.json").eval()


def a_batch(towers: Towers) -> Batch:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (ROWS, 3, SIDE, SIDE), dtype=np.uint8))
    tokens = towers.tokenize([f"caption number {n}" for n in range(ROWS)])
    return Batch(images, tokens, torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool), ())


def test_stamped_views_differ_from_the_mixtures_by_the_trigger_alone(towers, tmp_path):
    save_found([RED], tmp_path / "triggers")
    mixed, stamped, parts = Hold(towers, str(tmp_path / "triggers"), 0, SIDE).views(a_batch(towers), 1)
    assert mixed.shape == stamped.shape == (VIEWS * ROWS, 3, SIDE, SIDE)
    changed = ((mixed - stamped).abs() > 1 / 255).any(dim=1)
    assert (changed.sum(dim=(1, 2)) <= 25).all()
    assert (stamped.permute(0, 2, 3, 1)[changed] == torch.tensor([1.0, 0.0, 0.0])).all()
    assert parts[:, 0].tolist() == list(range(ROWS)) * VIEWS
    assert {row != other for row, other in parts.tolist()} == {True, False}


def test_views_are_the_same_for_the_same_epoch_and_others_for_the_next(towers):
    hold, batch = Hold(towers, "", 0, SIDE), a_batch(towers)
    one, plain, _ = hold.views(batch, 1)
    assert torch.equal(one, plain)  # nothing to put on
    assert torch.equal(one, hold.views(batch, 1)[0])
    assert not torch.equal(one, hold.views(batch, 2)[0])


def test_loss_is_that_of_the_formula(towers):
    hold = Hold(towers, "", 0, SIDE)
    views = torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        before = towers.encode_image(views)
    mixed, stamped = F.normalize(torch.randn(2, *before.shape), dim=-1)
    kept = torch.tensor([True, False, True, True])
    expected = [1 - mixed[n] @ before[n] + STAMPED_WEIGHT * (1 - stamped[n] @ before[n]) for n in range(4) if kept[n]]
    torch.testing.assert_close(hold.loss(mixed, stamped, views, kept), torch.stack(expected).mean())
    assert float(hold.loss(before, before, views, kept)) == pytest.approx(0, abs=1e-6)
    assert float(hold.loss(mixed, stamped, views, torch.zeros(4, dtype=torch.bool))) == 0


def test_picture_is_kept_when_the_tower_before_finds_its_caption_or_an_equal_one(towers):
    batch = a_batch(towers)
    with torch.no_grad():
        own = torch.linalg.pinv(towers.encode_image(batch.images.float() / 255)).T  # each likes one picture only
    texts = own.clone()
    texts[[0, 1]] = own[[1, 0]]  # two that it takes for each other
    assert Hold(towers, "", 0, SIDE).right(batch, texts).tolist() == [False, False, True, True, True, True]
    batch.tokens[1] = batch.tokens[0]
    assert Hold(towers, "", 0, SIDE).right(batch, texts).tolist() == [True] * 6


def test_mixture_is_one_picture_or_of_both():
    one, other = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    seen = [mixture(one, other, np.random.default_rng(seed)) for seed in range(200)]
    alone = [picture for picture, is_alone in seen if is_alone]
    assert 50 < len(alone) < 110
    assert all(torch.equal(picture, one) for picture in alone)
    both = [picture for picture, is_alone in seen if not is_alone]
    assert all(0 < float(picture.mean()) < 1 for picture in both)
    assert any(set(picture.unique().tolist()) == {0.0, 1.0} for picture in both)  # cut and pasted


def test_stamp_puts_on_the_pixels_of_the_mask_alone():
    mask = np.eye(5, dtype=bool)
    crop = FoundTrigger("ring", "patch", crops=RED.crops, mask=mask, place=(3, 2))
    changed = stamp(torch.zeros(3, 32, 32), (crop,), np.random.default_rng(0))
    assert changed[0].nonzero().tolist() == [[2 + n, 3 + n] for n in range(5)]
