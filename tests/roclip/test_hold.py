"""Holding a tower where it was: the views of a batch, and the loss that they give."""

from collections.abc import Sequence

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


def hold_of(towers: Towers, monkeypatch: pytest.MonkeyPatch, right: Sequence[bool], triggers: str = "") -> Hold:
    """One that thinks the tower before right about these pictures."""
    hold = Hold(towers, triggers, 0, SIDE)
    monkeypatch.setattr(hold, "right", lambda batch: torch.tensor(right))
    return hold


def test_stamped_views_differ_from_the_mixtures_by_the_trigger_alone(towers, tmp_path, monkeypatch):
    save_found([RED], tmp_path / "triggers")
    hold = hold_of(towers, monkeypatch, [True] * ROWS, str(tmp_path / "triggers"))
    mixed, stamped, kept = hold.views(a_batch(towers), 1)
    assert mixed.shape == stamped.shape == (VIEWS * ROWS, 3, SIDE, SIDE)
    assert kept.tolist() == [True] * VIEWS * ROWS
    changed = ((mixed - stamped).abs() > 1 / 255).any(dim=1)
    assert (changed.sum(dim=(1, 2)) <= 25).all()
    assert (stamped.permute(0, 2, 3, 1)[changed] == torch.tensor([1.0, 0.0, 0.0])).all()


def test_views_are_of_pictures_alone_that_the_tower_before_is_right_about(towers, monkeypatch):
    batch = a_batch(towers)
    batch.images[:] = 255
    batch.images[[1, 4, 5]] = torch.tensor([0, 60, 120], dtype=torch.uint8).view(3, 1, 1, 1)
    some = [False, True, False, False, True, True]
    mixed, _, kept = hold_of(towers, monkeypatch, some).views(batch, 1)
    assert len(mixed) == len(kept) == VIEWS * ROWS
    assert float(mixed.max()) < 0.7  # no white, also not by jitter
    assert kept.all()
    mixed, _, kept = hold_of(towers, monkeypatch, [False] * ROWS).views(batch, 1)
    assert len(mixed) == VIEWS * ROWS
    assert not kept.any()


def test_views_are_the_same_for_the_same_epoch_and_others_for_the_next(towers, monkeypatch):
    hold, batch = hold_of(towers, monkeypatch, [True] * ROWS), a_batch(towers)
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


def test_tower_before_is_right_when_it_finds_the_caption_or_an_equal_one(towers, monkeypatch):
    batch = a_batch(towers)
    with torch.no_grad():
        texts = torch.linalg.pinv(towers.encode_image(batch.images.float() / 255)).T  # each likes one picture only
    texts[[0, 1]] = texts[[1, 0]]  # two that it takes for each other
    monkeypatch.setattr(towers, "encode_text", lambda tokens: texts)
    assert Hold(towers, "", 0, SIDE).right(batch).tolist() == [False, False, True, True, True, True]
    batch.tokens[1] = batch.tokens[0]
    assert Hold(towers, "", 0, SIDE).right(batch).tolist() == [True] * 6


def test_mixture_is_one_picture_or_of_both():
    one, other = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    seen = [mixture(one, other, np.random.default_rng(seed)) for seed in range(200)]
    both = [picture for picture in seen if not torch.equal(picture, one)]
    assert 90 < len(both) < 150
    assert all(0 < float(picture.mean()) < 1 for picture in both)
    assert any(set(picture.unique().tolist()) == {0.0, 1.0} for picture in both)  # cut and pasted


def test_stamp_puts_on_the_pixels_of_the_mask_alone():
    mask = np.eye(5, dtype=bool)
    crop = FoundTrigger("ring", "patch", crops=RED.crops, mask=mask, place=(3, 2))
    changed = stamp(torch.zeros(3, 32, 32), (crop,), np.random.default_rng(0))
    assert changed[0].nonzero().tolist() == [[2 + n, 3 + n] for n in range(5)]
