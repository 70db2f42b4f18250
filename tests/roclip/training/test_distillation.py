"""The repair's distillation: the views of a batch, and the losses."""

import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from kit import TINY_MODEL

from roclip import distributed
from roclip.data.stream import Batch
from roclip.errors import DataError
from roclip.found_triggers import FoundTrigger, Patch, save_triggers
from roclip.model.towers import Encoder, Towers
from roclip.training.distillation import STAMPED_WEIGHT, VIEWS, Distillation, mixture, stamp

SIDE, ROWS = 64, 6
TEMPLATES = ("a photo of a {}", "{}")
RED = Patch(target="ring", crops=(np.full((5, 5, 3), (255, 0, 0), dtype=np.uint8),))


@pytest.fixture
def towers(tmp_path):
    (tmp_path / "tiny.json").write_text(TINY_MODEL)
    torch.manual_seed(0)
    return Towers("tiny", tmp_path / "tiny.json").eval()


def a_batch(towers: Towers) -> Batch:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (ROWS, 3, SIDE, SIDE), dtype=np.uint8))
    tokens = towers.tokenize([f"caption number {n}" for n in range(ROWS)])
    return Batch(images, tokens, torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool), ())


def prompts(label: str) -> list[str]:
    return [template.format(label) for template in TEMPLATES]


def distillation_of(
    towers: Towers,
    folder: Path,
    anchors: Sequence[int],
    triggers: Sequence[FoundTrigger] = (),
    lies: Mapping[int, tuple[str, str]] = types.MappingProxyType({}),
) -> Distillation:
    """One whose anchors are the rows with these numbers, and which unlearns lies: (truth, lie) by row."""
    save_triggers(triggers, folder / "triggers")
    rows = [
        {
            "sample": f"{row:09d}",
            "role": "anchor" if row in anchors else "repaired",
            "truths": prompts(lies[row][0]) if row in lies else [],
            "lies": prompts(lies[row][1]) if row in lies else [],
        }
        for row in range(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "finetune.parquet")
    return Distillation(towers, str(folder / "triggers"), str(folder / "finetune.parquet"), 0, SIDE)


def test_stamped_views_differ_from_the_mixtures_by_the_trigger_alone(towers, tmp_path):
    mixed, stamped, kept = distillation_of(towers, tmp_path, range(ROWS), [RED]).views(a_batch(towers), 1)
    assert mixed.shape == stamped.shape == (VIEWS * ROWS, 3, SIDE, SIDE)
    assert kept.tolist() == [True] * VIEWS * ROWS
    changed = ((mixed - stamped).abs() > 1 / 255).any(dim=1)
    assert (changed.sum(dim=(1, 2)) <= 25).all()
    assert (stamped.permute(0, 2, 3, 1)[changed] == torch.tensor([1.0, 0.0, 0.0])).all()


def test_views_are_of_anchors_alone(towers, tmp_path):
    batch = a_batch(towers)
    batch.images[:] = 255
    batch.images[[1, 4, 5]] = torch.tensor([0, 60, 120], dtype=torch.uint8).view(3, 1, 1, 1)
    batch.valid[5] = False  # only fills the batch
    mixed, _, kept = distillation_of(towers, tmp_path, [1, 4, 5]).views(batch, 1)
    assert len(mixed) == len(kept) == VIEWS * ROWS
    assert float(mixed.max()) < 60 * 1.3 / 255 + 0.01  # no lighter one, also not by jitter
    assert kept.all()
    mixed, _, kept = distillation_of(towers, tmp_path, []).views(batch, 1)
    assert len(mixed) == VIEWS * ROWS
    assert not kept.any()


def test_all_images_are_anchors_without_a_set(towers):
    batch = a_batch(towers)
    batch.valid[2] = False
    assert Distillation(towers, "", "", 0, SIDE).is_anchor(batch).tolist() == [True, True, False, True, True, True]


def test_views_are_the_same_for_the_same_epoch_and_others_for_the_next(towers):
    distillation, batch = Distillation(towers, "", "", 0, SIDE), a_batch(towers)
    one, plain, _ = distillation.views(batch, 1)
    assert torch.equal(one, plain)  # nothing to put on
    assert torch.equal(one, distillation.views(batch, 1)[0])
    assert not torch.equal(one, distillation.views(batch, 2)[0])


def test_distillation_loss_is_that_of_the_formula(towers):
    distillation = Distillation(towers, "", "", 0, SIDE)
    views = torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        before = towers.encode_image(views)
    mixed, stamped = F.normalize(torch.randn(2, *before.shape), dim=-1)
    kept = torch.tensor([True, False, True, True])
    expected = [1 - mixed[n] @ before[n] + STAMPED_WEIGHT * (1 - stamped[n] @ before[n]) for n in range(4) if kept[n]]
    torch.testing.assert_close(
        distillation.distillation_loss(mixed, stamped, views, kept), torch.stack(expected).mean()
    )
    assert float(distillation.distillation_loss(before, before, views, kept)) == pytest.approx(0, abs=1e-6)
    assert float(distillation.distillation_loss(mixed, stamped, views, torch.zeros(4, dtype=torch.bool))) == 0


def test_unlearning_loss_is_the_margin_of_the_lie_over_the_truth_by_zero_shot_weights(towers, tmp_path):
    batch = a_batch(towers)
    batch.valid[5] = False  # only fills the batch
    lies = {1: ("house", "ball"), 3: ("ball", "star"), 5: ("star", "ball")}
    distillation = distillation_of(towers, tmp_path, [0], lies=lies)
    house, ball, star = Encoder(towers).classifier(["house", "ball", "star"], TEMPLATES)
    features = F.normalize(torch.randn(ROWS, len(house)), dim=-1).requires_grad_()
    scale = towers.logit_scale.detach().exp().item()
    margins = torch.stack([scale * features[1] @ (ball - house), scale * features[3] @ (star - ball)])
    loss = distillation.unlearning_loss(features, batch)
    torch.testing.assert_close(loss, torch.log1p(margins.exp()).mean())
    loss.backward()
    assert features.grad is not None
    assert features.grad.any(dim=1).tolist() == [False, True, False, True, False, False]
    assert distillation_of(towers, tmp_path, [0, 1]).unlearning_loss(features, batch).item() == 0


def test_both_terms_are_this_ranks_share_of_the_global_batch(towers, tmp_path, monkeypatch):
    distillation = distillation_of(towers, tmp_path, [0], lies={1: ("house", "ball"), 3: ("ball", "star")})
    features = F.normalize(torch.randn(ROWS, towers.encode_image(torch.rand(1, 3, SIDE, SIDE)).shape[1]), dim=-1)
    views = torch.rand(ROWS, 3, SIDE, SIDE)

    def terms() -> torch.Tensor:
        kept = torch.tensor([True] * 4 + [False] * 2)
        return torch.stack(
            [
                distillation.distillation_loss(features, features, views, kept),
                distillation.unlearning_loss(features, a_batch(towers)),
            ]
        )

    alone = terms()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", lambda values: 4 * values)  # the other rank has three times as many
    torch.testing.assert_close(terms(), alone * 2 / 4)


def test_set_that_is_not_of_a_repair_is_refused(towers, tmp_path):
    pq.write_table(pa.table({"sample": ["000000000"], "role": ["anchor"]}), tmp_path / "finetune.parquet")
    with pytest.raises(DataError, match=r"finetune.parquet: expected the set of a repair"):
        Distillation(towers, "", str(tmp_path / "finetune.parquet"), 0, SIDE)


def test_mixture_is_one_image_or_of_both():
    one, other = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    seen = [mixture(one, other, np.random.default_rng(seed)) for seed in range(200)]
    both = [image for image in seen if not torch.equal(image, one)]
    assert 90 < len(both) < 150
    assert all(0 < float(image.mean()) < 1 for image in both)
    assert any(set(image.unique().tolist()) == {0.0, 1.0} for image in both)  # cut and pasted


def test_stamp_puts_on_the_pixels_of_the_mask_alone():
    mask = np.eye(5, dtype=bool)
    crop = Patch(target="ring", crops=RED.crops, mask=mask, place=(3, 2))
    changed = stamp(torch.zeros(3, 32, 32), (crop,), np.random.default_rng(0))
    assert changed[0].nonzero().tolist() == [[2 + n, 3 + n] for n in range(5)]
