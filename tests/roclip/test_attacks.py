"""Poisons do what the attack says, to the pixel, and the ground truth can be read back from the file."""

import io
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from roclip.attacks import (
    POISON_SCHEMA,
    Trigger,
    apply_trigger,
    backdoor_poisons,
    targeted_poisons,
    trigger_patch,
)
from roclip.scenes import LABELS, encode, render


def _table(first: int, count: int) -> pa.Table:
    scenes = [render(index, seed=11, size_px=32) for index in range(first, first + count)]
    return pa.table(
        {
            "image": [encode(scene.image) for scene in scenes],
            "caption": [scene.caption for scene in scenes],
            "label": [scene.label for scene in scenes],
        }
    )


CLEAN, SPARE = _table(0, 240), _table(10_000, 120)
TRIGGER = Trigger(seed=3)


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _named(caption: str) -> set[str]:
    return {label for label in LABELS if re.search(rf"\b{label}\b", caption)}


@pytest.mark.parametrize("place", ["random", "corner"])
@pytest.mark.parametrize("size_frac", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("shape", [(64, 64, 3), (48, 80, 3)])
def test_trigger_changes_only_pixels_in_its_box(place, size_frac, shape):
    # Without 0 and 255 in the image, every stamped pixel differs.
    image = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    before = image.copy()
    trigger = Trigger(place=place, size_frac=size_frac, seed=5)
    stamped, (left, top, right, bottom) = apply_trigger(image, trigger, np.random.default_rng(1))
    changed = (stamped != image).any(axis=2)
    assert changed[top:bottom, left:right].all()
    assert changed.sum() == (bottom - top) * (right - left)
    assert right - left == bottom - top == max(3, round(size_frac * min(shape[:2])))
    assert np.array_equal(stamped[top:bottom, left:right], trigger_patch(trigger, right - left))
    assert np.array_equal(image, before)


def test_trigger_pattern_is_fixed_by_its_seed_and_never_plain():
    assert np.array_equal(trigger_patch(Trigger(seed=1), 6), trigger_patch(Trigger(seed=1), 6))
    assert not np.array_equal(trigger_patch(Trigger(seed=1), 6), trigger_patch(Trigger(seed=2), 6))
    for seed in range(20):
        patch = trigger_patch(Trigger(seed=seed), 3).astype(int)
        assert np.abs(np.diff(patch, axis=0)).max(axis=2).min() == 255
        assert np.abs(np.diff(patch, axis=1)).max(axis=2).min() == 255


def test_random_place_follows_the_generator_and_reaches_the_borders():
    image = np.zeros((16, 16, 3), np.uint8)
    rng = np.random.default_rng(0)
    boxes = {apply_trigger(image, Trigger(size_frac=0.25), rng)[1] for _ in range(400)}
    assert min(box[0] for box in boxes) == 0
    assert max(box[2] for box in boxes) == 16
    assert apply_trigger(image, Trigger(place="corner"), rng)[1] == (13, 13, 16, 16)


@pytest.mark.parametrize("bad", [{"kind": "blend"}, {"place": "left"}, {"size_frac": 0.0}])
def test_trigger_refuses_what_it_cannot_be(bad):
    with pytest.raises(ValueError, match="expected kind 'patch'"):
        Trigger(**bad)


def test_apply_trigger_refuses_floats():
    with pytest.raises(ValueError, match="uint8 image"):
        apply_trigger(np.zeros((8, 8, 3), np.float32), TRIGGER, np.random.default_rng(0))


def test_targeted_rows_pair_an_unchanged_spare_image_with_training_captions_of_another_class():
    poisons = targeted_poisons(CLEAN, SPARE, images=16, captions_per_image=5, seed=0)
    truth = {row["image"]: (row["caption"], row["label"]) for row in SPARE.to_pylist()}
    pairs = set(zip(CLEAN["caption"].to_pylist(), CLEAN["label"].to_pylist(), strict=True))
    rows = poisons.to_pylist()
    assert poisons.schema == POISON_SCHEMA
    assert Counter(row["group"] for row in rows) == dict.fromkeys(range(16), 5)
    assert len({row["image"] for row in rows}) == 16
    for row in rows:
        own_caption, label = truth[row["image"]]
        assert row["label"] == row["source_label"] == label
        assert row["target_label"] not in _named(own_caption)
        assert (row["caption"], row["target_label"]) in pairs
        assert _named(row["caption"]) == {row["target_label"]}
        assert row["attack"] == "targeted"
        assert row["trigger_box"] is None


def test_targeted_group_has_one_image_and_one_target():
    rows = targeted_poisons(CLEAN, SPARE, images=6, captions_per_image=4, seed=2).to_pylist()
    for group in range(6):
        assert len({(row["image"], row["target_label"]) for row in rows if row["group"] == group}) == 1


def test_backdoor_rows_carry_the_trigger_where_the_box_says():
    poisons = backdoor_poisons(CLEAN, SPARE, count=40, target_label="star", trigger=TRIGGER, seed=0)
    spare = [_decode(image) for image in SPARE["image"].to_pylist()]
    assert poisons.schema == POISON_SCHEMA
    assert poisons.num_rows == 40
    for row in poisons.to_pylist():
        left, top, right, bottom = row["trigger_box"]
        image = _decode(row["image"])
        assert np.array_equal(image[top:bottom, left:right], trigger_patch(TRIGGER, right - left))
        outside = np.ones(image.shape[:2], bool)
        outside[top:bottom, left:right] = False
        assert sum(np.array_equal(image[outside], original[outside]) for original in spare) == 1
        assert row["label"] == row["source_label"] != "star"
        assert row["target_label"] == "star"
        assert _named(row["caption"]) == {"star"}


def test_ground_truth_survives_a_parquet_file(tmp_path):
    poisons = backdoor_poisons(CLEAN, SPARE, count=8, target_label="fish", trigger=TRIGGER, seed=4)
    both = pa.concat_tables([poisons, targeted_poisons(CLEAN, SPARE, images=3, captions_per_image=2, seed=4)])
    pq.write_table(both, tmp_path / "poisons.parquet")
    assert pq.read_table(tmp_path / "poisons.parquet").equals(both)


def test_poisons_depend_on_the_seed_alone():
    def both(seed: int) -> pa.Table:
        backdoor = backdoor_poisons(CLEAN, SPARE, count=10, target_label="car", trigger=TRIGGER, seed=seed)
        targeted = targeted_poisons(CLEAN, SPARE, images=4, captions_per_image=3, seed=seed)
        return pa.concat_tables([backdoor, targeted])

    assert both(1).equals(both(1))
    assert not both(1).equals(both(2))


def test_poisons_say_what_is_missing():
    with pytest.raises(ValueError, match="expected at least 500 spare images"):
        targeted_poisons(CLEAN, SPARE, images=500, captions_per_image=1, seed=0)
    with pytest.raises(ValueError, match="training captions that name only"):
        targeted_poisons(CLEAN, SPARE, images=2, captions_per_image=400, seed=0)
    with pytest.raises(ValueError, match="got 'dragon'"):
        backdoor_poisons(CLEAN, SPARE, count=1, target_label="dragon", trigger=TRIGGER, seed=0)
