"""What every oracle does the same way: regions and answers out of maps, calibration, trusted images."""

import dataclasses

import numpy as np
import pytest
import torch
from rigged import GOOD, LABELS, SIDE, STEP, RiggedSegmenter

from roclip.errors import DataError
from roclip.oracle.segmenters import base
from roclip.oracle.segmenters.base import MIN_AREA, Segmenter, one_hot, with_background


def image_of(*things: tuple[str, int, int, int, int]) -> np.ndarray:
    """Things of a label at left, top, right, bottom."""
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    for label, left, top, right, bottom in things:
        image[top:bottom, left:right, 0] = STEP * (1 + LABELS.index(label))
    return image


def test_regions_are_the_connected_parts_of_a_mask():
    image = image_of(("bee", 0, 0, 8, 16), ("cat", 20, 20, 24, 32), ("bee", 16, 0, 20, 4), ("dog", 30, 0, 31, 1))
    regions, nothing = RiggedSegmenter().regions(np.stack([image, image_of()]))
    assert [(region.label, region.box) for region in regions] == [
        ("bee", (0, 0, 8, 16)),
        ("cat", (20, 20, 24, 32)),
        ("bee", (16, 0, 20, 4)),
    ]  # the dog is smaller than anything that must be seen
    assert 1 / SIDE**2 < MIN_AREA
    assert [region.area for region in regions] == [128 / 1024, 48 / 1024, 16 / 1024]
    assert all(region.score == 1 and region.mask.sum() == region.area * 1024 for region in regions)
    assert regions[1].mask[20:32, 20:24].all()
    assert nothing == []


def test_region_scores_the_mean_of_its_label_and_comes_in_pixels_of_the_image():
    class Unsure(RiggedSegmenter):
        def maps(self, images):
            yield torch.tensor([[[[0.2, 1.0]] * 2, [[0.8, 0.0]] * 2, *[[[0.0, 0.0]] * 2] * 5]])

    (region,) = Unsure().regions(np.zeros((1, 4, 4, 3), dtype=np.uint8))[0]
    assert (region.label, region.box, region.area) == ("ant", (0, 0, 2, 4), 0.5)
    assert region.score == pytest.approx((0.8 + 0.6) / 2)  # bilinear between 0.8 and 0


def test_query_gives_the_largest_region_of_each_label():
    images = np.stack([image_of(("bee", 0, 0, 4, 4), ("bee", 10, 0, 20, 10)), image_of(("cat", 0, 0, 9, 9))])
    first, second = RiggedSegmenter().query(images, ["bee", "fox"])
    assert first["bee"] is not None
    assert first["bee"].box == (10, 0, 20, 10)
    assert first["fox"] is None
    assert second == {"bee": None, "fox": None}


def test_query_refuses_a_label_that_is_unchecked():
    segmenter = RiggedSegmenter(blind=("bee",))
    for label in ("bee", "yak"):
        assert not segmenter.covers(label)
        with pytest.raises(DataError, match=f"got {label}"):
            segmenter.query(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8), ["ant", label])


def test_areas_and_masks_of_no_image_are_empty():
    none = np.empty((0, SIDE, SIDE, 3), dtype=np.uint8)
    assert RiggedSegmenter().areas(none).shape == (0, len(LABELS))
    assert RiggedSegmenter().masks(none).shape == (0, SIDE, SIDE)
    assert RiggedSegmenter().regions(none) == []


def test_masks_are_wider_when_there_are_many_labels():
    class Many(Segmenter):
        labels = tuple(map(str, range(300)))

        def maps(self, images):
            yield one_hot(np.full((1, 4, 4), 299), 300)

    assert Many().masks(np.zeros((1, 4, 4, 3), dtype=np.uint8)).max() == 299


def test_background_is_what_the_best_label_leaves():
    maps = with_background(torch.tensor([0.6, 0.2, 0.0]).view(1, 3, 1, 1)).flatten()
    assert maps.tolist() == pytest.approx([0.4, 0.45, 0.15, 0.0])
    assert with_background(torch.zeros(1, 3, 1, 1)).flatten().tolist() == [1, 0, 0, 0]


def test_label_is_covered_only_when_the_oracle_can_tell_it_apart():
    truth = np.arange(200) < 50
    sharp = np.where(truth, 0.2, 0.01) + np.linspace(0, 0.001, 200)
    good = base._calibrate(sharp, truth)
    assert good.covered
    assert 0.011 < good.seen <= good.clear <= 0.2011
    blind = base._calibrate(np.random.default_rng(0).random(200), truth)
    assert not blind.covered
    assert blind.recall is not None
    assert blind.recall >= 0.9  # the threshold is set for recall; it is the specificity that gives a blind label away
    rare = base._calibrate(sharp[46:], truth[46:])
    assert rare.examples == 4
    assert not rare.covered
    assert not base._calibrate(sharp[50:], truth[50:]).covered  # never shown


def test_label_without_a_class_stays_unknown_when_the_oracle_is_calibrated(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rigged import World

    world = World(tmp_path).reference(240)
    pq.write_table(pa.Table.from_pylist(world.trusted), tmp_path / "trusted.parquet")
    segmenter = RiggedSegmenter()
    segmenter.calibration = {label: dataclasses.replace(GOOD, seen=0.9) for label in LABELS[:-1]}
    base.calibrate_on(segmenter, tmp_path / "trusted.parquet", 0.5, seed=1)
    assert list(segmenter.calibration) == list(LABELS[:-1])
    assert all(row.covered and row.seen == 0.25 for row in segmenter.calibration.values())
    assert len(segmenter.info["reference_rows"]) == 120
    assert segmenter.info["calibrated"]
