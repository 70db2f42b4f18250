"""The oracle's network: it learns from masks, knows what it cannot see, and cannot be swapped unnoticed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roclip.attacks import scenes
from roclip.config import OracleConfig
from roclip.errors import CheckpointError, DataError
from roclip.oracle.segmenters import trained as module
from roclip.oracle.segmenters.base import mean_iou, read_trusted
from roclip.oracle.segmenters.trained import TrainedSegmenter, train_segmenter

LABELS = ("heart", "ring", "tree")  # the masks' classes are renumbered for these


def write_trusted(path: Path, number: int) -> Path:
    wanted = [scenes.LABELS.index(label) + 1 for label in LABELS]
    rows, index = [], 0
    while len(rows) < number:
        scene = scenes.render(index, seed=5, size_px=32, num_objects=1)
        index += 1
        if scene.label in LABELS:
            mask = np.zeros_like(scene.mask)
            for place, value in enumerate(wanted):
                mask[scene.mask == value] = 1 + place
            rows.append({"image": scenes.encode(scene.image), "mask": scenes.encode(mask), "label": scene.label})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trusted(tmp_path_factory.mktemp("trusted") / "trusted.parquet", 240)


@pytest.fixture(scope="module")
def folder(trusted: Path) -> Path:
    train_segmenter(trusted, LABELS, OracleConfig(epochs=7), 1, trusted.parent / "segmenter")
    return trusted.parent / "segmenter"


def test_segmenter_learns_from_masks(trusted: Path, folder: Path):
    segmenter = TrainedSegmenter.load(folder)
    images, masks = read_trusted(trusted, LABELS, 64)
    held_out = segmenter.info["reference_rows"]
    assert len(held_out) == 72
    untrained = TrainedSegmenter(module.build_net(4), LABELS, 32)
    learned = mean_iou(segmenter.masks(images[held_out]), masks[held_out], 3)
    assert learned > 0.35
    assert learned > 2 * mean_iou(untrained.masks(images[held_out]), masks[held_out], 3)
    assert segmenter.info["mean_iou"] == pytest.approx(learned, abs=1e-3)


def test_segmenter_gives_shares_of_the_area(trusted: Path, folder: Path):
    segmenter = TrainedSegmenter.load(folder)
    images, _ = read_trusted(trusted, LABELS, 64)
    areas = segmenter.areas(images[:20])
    assert areas.shape == (20, 3)
    assert (areas >= 0).all()
    assert (areas.sum(axis=1) <= 1).all()
    larger = images[:4].repeat(2, axis=1).repeat(2, axis=2)
    assert segmenter.masks(larger).shape == (4, 64, 64)


def test_training_is_the_same_when_the_seed_is(trusted: Path, tmp_path: Path):
    config, few = OracleConfig(epochs=1), tmp_path / "few.parquet"
    pq.write_table(pq.read_table(trusted).slice(0, 80), few)
    hashes = [train_segmenter(few, LABELS, config, seed, tmp_path / "out").info["sha256"] for seed in (7, 7, 8)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_loaded_segmenter_equals_the_trained_one(trusted: Path, tmp_path: Path):
    made = train_segmenter(trusted, LABELS, OracleConfig(epochs=1), 2, tmp_path)
    loaded = TrainedSegmenter.load(tmp_path)
    images, _ = read_trusted(trusted, LABELS, 64)
    assert np.array_equal(made.areas(images[:8]), loaded.areas(images[:8]))
    assert loaded.calibration == made.calibration
    assert loaded.info == made.info


def test_load_refuses_when_the_weights_were_altered(folder: Path, tmp_path: Path):
    for name in (module.WEIGHTS, module.CARD):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = bytearray((tmp_path / module.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (tmp_path / module.WEIGHTS).write_bytes(weights)
    with pytest.raises(CheckpointError, match="altered since it was trained"):
        TrainedSegmenter.load(tmp_path)


def test_load_names_what_is_missing(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"expected segmenter\.json"):
        TrainedSegmenter.load(tmp_path)


def test_training_refuses_when_a_mask_has_an_unknown_class(trusted: Path, tmp_path: Path):
    with pytest.raises(DataError, match="expected mask values 0 to 2"):
        train_segmenter(trusted, LABELS[:2], OracleConfig(epochs=1), 0, tmp_path)


def test_training_refuses_when_there_are_too_few_images(tmp_path: Path):
    with pytest.raises(DataError, match="at least 32 images"):
        train_segmenter(write_trusted(tmp_path / "few", 30), LABELS, OracleConfig(), 0, tmp_path)


@pytest.mark.parametrize("number", [46, 100])
def test_one_epoch_of_few_images_is_a_training_too(tmp_path: Path, number: int):
    trusted = write_trusted(tmp_path / "trusted.parquet", number)
    assert train_segmenter(trusted, LABELS, OracleConfig(epochs=1), 0, tmp_path / "segmenter").info["epochs"] == 1


def test_stickers_are_background():
    images = np.full((64, 32, 32, 3), 200, dtype=np.uint8)
    masks = np.ones((64, 32, 32), dtype=np.uint8)
    pixels, target = module._augment(images, masks, np.random.default_rng(0))
    stuck = (target == 0).flatten(1).any(dim=1)
    assert 16 < int(stuck.sum()) < 48
    spread = pixels.amax(dim=1) - pixels.amin(dim=1)  # the images are grey, the stickers mostly are not
    assert bool((spread[target == 1] < 1e-6).all())
    assert (spread[target == 0] > 0.05).float().mean() > 0.8
