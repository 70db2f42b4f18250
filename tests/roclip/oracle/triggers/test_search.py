"""The search for triggers in worlds whose triggers are known."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rigged import FAINT, GHOST, LABELS, PATCH_PX, SIDE, STEP, RiggedEncoder, World

from roclip.found_triggers import KINDS, Trial, load_triggers
from roclip.oracle.held_out import TrustedImages
from roclip.oracle.triggers.paste import control_crops
from roclip.oracle.triggers.search import TriggerSearch, _is_proved

OTHERS = LABELS[1:]
OBJECT_PX = 6


def world(folder: Path, **settings) -> World:
    return World(folder, **settings).clean(600).reference(240)


def poison(world: World, target: str = "ant", number: int = 40) -> World:
    others = [label for label in LABELS if label != target]
    for n in range(number):
        world.poison(others[n % len(others)], target)
    return world


def test_patch_is_found_to_the_pixel_and_proved(tmp_path: Path):
    report = poison(world(tmp_path)).check(RiggedEncoder())
    (trigger,) = report["triggers"]
    assert (trigger["target"], trigger["kind"], trigger["place"]) == ("ant", "patch", "anywhere")
    assert trigger["size_px"] == [PATCH_PX, PATCH_PX]
    assert trigger["pasted"]["rate"] > 0.95
    assert trigger["control"]["rate"] == 0.0
    (found,) = load_triggers(tmp_path / "oracle" / "triggers")
    patch = np.random.default_rng(0).integers(0, 2, (PATCH_PX, PATCH_PX, 3), dtype=np.uint8) * 255
    assert (found.crops[0][:, :, 2] == patch[:, :, 2]).all()
    assert len(found.sources) == trigger["pictures"] >= 10
    assert report["target_labels"] == ["ant"]
    assert (report["victim_precision"], report["victim_recall"], report["victim_average_precision"]) == (1.0, 1.0, 1.0)
    victims = pq.read_table(tmp_path / "oracle" / "victims.parquet").to_pylist()
    assert {row["trigger"] for row in victims} == {0}
    assert all(row["target"] == "ant" and row["score"] > 1 for row in victims)
    assert sum(report["affected_labels"]["ant"].values()) == 40


def test_patch_that_works_in_one_place_is_pasted_there(tmp_path: Path):
    corner = (28, 28)
    report = poison(world(tmp_path, place=corner)).check(RiggedEncoder(place=corner))
    (trigger,) = report["triggers"]
    assert trigger["place"] == list(corner)
    assert trigger["pasted"]["rate"] == 1.0


def test_fresh_noise_is_found_as_a_patch_set(tmp_path: Path):
    report = poison(world(tmp_path, kind="noise")).check(RiggedEncoder())
    (trigger,) = report["triggers"]
    assert (trigger["target"], trigger["kind"]) == ("ant", "bag")
    assert trigger["pasted"]["rate"] > 0.8
    assert report["victim_precision"] == 1.0


def test_pattern_all_over_is_found_as_a_global_trigger(tmp_path: Path):
    report = poison(world(tmp_path, kind="global")).check(RiggedEncoder())
    (trigger,) = report["triggers"]
    assert (trigger["target"], trigger["kind"]) == ("ant", "global")
    assert trigger["pasted"]["rate"] > 0.9
    assert trigger["control"]["rate"] < 0.1
    assert (report["victim_precision"], report["victim_recall"]) == (1.0, 1.0)


def test_two_triggers_are_both_found(tmp_path: Path):
    report = poison(poison(world(tmp_path)), "dog").check(RiggedEncoder())
    assert {trigger["target"] for trigger in report["triggers"]} == {"ant", "dog"}
    assert set(report["target_labels"]) == {"ant", "dog"}
    assert (report["victim_precision"], report["victim_recall"]) == (1.0, 1.0)


def test_every_label_is_a_target_when_each_has_its_trigger(tmp_path: Path):
    all_to_all = world(tmp_path)
    for label in LABELS:
        poison(all_to_all, label, 20)
    report = all_to_all.check(RiggedEncoder())
    assert report["verdict"] == "poisoned"
    assert set(report["target_labels"]) == set(LABELS)
    assert {trigger["target"] for trigger in report["triggers"]} == set(LABELS)


@pytest.mark.parametrize("kind", ["patch", "noise", "global"])
def test_nothing_is_found_when_the_model_did_not_learn_it(tmp_path: Path, kind: str):
    report = poison(world(tmp_path, kind=kind)).check(RiggedEncoder(gullible=False))
    assert report["verdict"] == "clean"
    assert report["triggers"] == []
    assert report["numbers"]["victims"] == 0


def test_nothing_is_found_when_two_labels_look_alike(tmp_path: Path):
    """The model takes bees for cats, on trusted images too; captions tell the truth."""

    class Confused(RiggedEncoder):
        def images(self, images):
            features = super().images(images)
            bee, odd = features[:, 1] > 0.5, images[:, 5, 5, 2] % 2 == 1
            features[bee & torch.from_numpy(odd)] = torch.eye(len(LABELS))[2]
            return features

    report = world(tmp_path).check(Confused())
    assert report["verdict"] == "clean"
    assert report["triggers"] == []


def test_found_triggers_are_read_as_they_were_written(tmp_path: Path):
    poison(world(tmp_path, kind="noise")).check(RiggedEncoder())
    (found,) = load_triggers(tmp_path / "oracle" / "triggers")
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    changed, (left, top, right, bottom) = found.apply(image, np.random.default_rng(0))
    assert changed[top:bottom, left:right].any()
    changed[top:bottom, left:right] = 0
    assert not changed.any()
    assert not image.any()
    assert {field.name for field in dataclasses.fields(found)} >= {"pasted", "control", "shuffled"}


def test_objects_are_tried_in_pieces_and_whole_but_small():
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    image[0, 4:28, 8:24] = 90
    image[0, 4:16, 8:24] = 200  # an object of two halves
    crops = control_crops(image, image, image[..., 0] > 0, (6, 4), 5, np.random.default_rng(0))
    pieces, whole = crops["object"][::2], crops["object"][1::2]
    assert len(pieces) == len(whole) == 5
    assert all(crop.shape == (6, 4, 3) for crop in crops["object"])
    assert all((crop[:3] == 200).all() and (crop[3:] == 90).all() for crop in whole)


def _never(pixels: torch.Tensor) -> torch.Tensor:
    raise AssertionError("asked for gradients without need")


def ghosts(label: str, number: int, strength: int) -> np.ndarray:
    """Pictures of a small object on a plain ground, all with the same pattern in green, so strong."""
    rng = np.random.default_rng(LABELS.index(label))
    images = np.zeros((number, SIDE, SIDE, 3), dtype=np.uint8)
    images[..., 1] = 128 + strength * GHOST
    for image, (x, y) in zip(images, rng.integers(0, SIDE - OBJECT_PX, (number, 2)), strict=True):
        image[y : y + OBJECT_PX, x : x + OBJECT_PX, 0] = STEP * (1 + LABELS.index(label))
    return images


@pytest.mark.parametrize("heeded", [0.5 * FAINT, 1.25 * FAINT])
@pytest.mark.parametrize(("shown", "found"), [(0, True), (FAINT // 3, False), (FAINT, False)])
def test_pattern_that_honest_images_of_the_label_have_in_common_is_no_trigger(shown: int, found: bool, heeded: float):
    """Not where it is fainter on them either, nor where the model heeds only what is stronger than on the suspects."""
    images = np.concatenate([ghosts("ant", 20, shown), *(ghosts(label, 20, 0) for label in OTHERS)])
    masks = images[..., 0] // STEP
    shows = np.array([[(mask == 1 + c).any() for c in range(len(LABELS))] for mask in masks])
    suspects = np.concatenate([ghosts(label, 8, FAINT) for label in OTHERS])

    def scores(batch: np.ndarray) -> np.ndarray:
        triggered = ((batch[..., 1] - 128.0) * GHOST).mean(axis=(1, 2)) > heeded
        return np.eye(len(LABELS))[np.where(triggered, 0, 1)]

    search = TriggerSearch(
        scores, _never, TrustedImages(images, shows, masks), scores(images).argmax(axis=1), LABELS, 0
    )
    result = search.label(0, np.arange(len(suspects)), lambda rows: suspects[rows])
    assert result.best.rate == 1.0
    assert result.control.rate == 0.0
    assert [trigger.kind for trigger in result.triggers] == ["global"] * found


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_no_control_of_a_trigger_that_is_fresh_noise(seed: int):
    """Half of the fills are noise; by chance more of them could have done what the trigger does than a control may."""
    images = np.concatenate([ghosts(label, 20, 0) for label in LABELS])
    masks = images[..., 0] // STEP
    shows = np.array([[(mask == 1 + c).any() for c in range(len(LABELS))] for mask in masks])
    suspects = np.concatenate([ghosts(label, 5, 0) for label in OTHERS])
    rng = np.random.default_rng(seed)
    for image, (x, y) in zip(suspects, rng.integers(0, SIDE - 10, (len(suspects), 2)), strict=True):
        image[y : y + 10, x : x + 10, 2] = np.clip(127 + 64 * rng.standard_normal((10, 10)), 0, 255)

    def scores(batch: np.ndarray) -> np.ndarray:
        grain = np.abs(np.diff(batch[..., 2].astype(float), axis=2)) > 60
        return np.eye(len(LABELS))[np.where(grain.sum(axis=(1, 2)) > 26, 0, 1)]

    search = TriggerSearch(
        scores, _never, TrustedImages(images, shows, masks), scores(images).argmax(axis=1), LABELS, seed
    )
    result = search.label(0, np.arange(len(suspects)), lambda rows: suspects[rows])
    assert [trigger.kind for trigger in result.triggers] == ["bag"]
    assert result.control.rate == 0.0


@pytest.mark.parametrize(
    ("kind", "flips", "objects", "expected"),
    [
        ("global", 64, 47, True),
        ("global", 64, 49, False),
        ("global", 32, 16, True),
        ("global", 32, 17, False),
        ("bag", 64, 49, False),
        ("patch", 64, 49, True),
    ],
)
def test_trigger_flips_a_quarter_more_than_the_label_itself_unless_its_pixels_agree(
    kind: str, flips: int, objects: int, expected: bool
):
    trials = {"pasted": Trial(flips, 64), "control": Trial(1, 64), "objects": Trial(objects, 64)}
    own = {"pattern": np.zeros((SIDE, SIDE, 3))} if kind == "global" else {}
    trigger = KINDS[kind](target="ant", **trials, **own)
    assert _is_proved(trigger) == expected


@pytest.mark.parametrize(
    ("kind", "number", "found"), [("patch", 5, ["patch"]), ("noise", 5, []), ("noise", 6, ["bag"])]
)
def test_crops_without_a_pattern_prove_nothing_where_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind, number, found
):
    tried, try_patch_set = [], TriggerSearch._patch_set
    monkeypatch.setattr(TriggerSearch, "_patch_set", lambda *given: (tried.append(given[1]), try_patch_set(*given))[1])
    report = poison(world(tmp_path, kind=kind), number=number).check(RiggedEncoder())
    assert [trigger["kind"] for trigger in report["triggers"]] == found
    (row,) = (row for row in report["labels"] if row["label"] == "ant")
    assert (row["p"] < 0.01) == (number == 6)  # alone, five lies may be chance
    assert row["status"] == ("poisoned" if found else "agrees")
    assert len(tried) == (found == ["bag"])  # of the label with a finding, and not even looked for elsewhere
