"""The verdict in worlds whose truth is known."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rigged import LABELS, RiggedEncoder, RiggedSegmenter, World, png

from roclip.errors import DataError
from roclip.oracle.segmenters.naming import name_labels

OTHERS = LABELS[1:]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path).clean(600).reference(240)


def backdoor(world: World, number: int = 40) -> World:
    for n in range(number):
        world.poison(OTHERS[n % len(OTHERS)], "ant")
    return world


def targeted(world: World, images: int = 8, captions: int = 6) -> World:
    for n in range(images):
        world.poison(LABELS[n % 6], LABELS[(n + 1 + n // 6) % 6], captions)
    return world


def test_verdict_is_poisoned_when_a_patch_causes_one_label(world: World):
    report = backdoor(world).check(RiggedEncoder())
    assert report["verdict"] == "poisoned"
    assert report["target_labels"] == ["ant"]
    row = report["labels"][0]
    assert (row["label"], row["lies"], row["repeated"], row["captions"]) == ("ant", 40, 40, 140)
    assert row["p"] < 1e-6
    assert (report["victim_precision"], report["victim_recall"]) == (1.0, 1.0)


def test_verdict_is_clean_when_the_model_did_not_learn_the_poison(world: World):
    report = targeted(backdoor(world)).check(RiggedEncoder(gullible=False))
    assert report["verdict"] == "clean"
    assert report["target_labels"] == []
    ant = next(row for row in report["labels"] if row["label"] == "ant")
    assert ant["lies"] >= 40
    assert ant["repeated"] == 0
    assert report["victim_precision"] is None
    assert report["victim_recall"] == 0.0


def test_verdict_is_clean_when_the_data_are(world: World):
    report = world.check(RiggedEncoder())
    assert report["verdict"] == "clean"
    assert report["numbers"]["victims"] == 0


def test_verdict_is_poisoned_when_few_images_come_with_many_captions(world: World):
    report = targeted(world).check(RiggedEncoder())
    assert report["verdict"] == "poisoned"
    assert report["copies"] == report["copies"] | {"images": 8, "lies": 8, "repeated": 8}
    assert report["numbers"]["distinct_images"] == 608
    assert report["numbers"]["samples"] == 648
    assert (report["victim_precision"], report["victim_recall"]) == (1.0, 1.0)


def test_verdict_is_clean_when_images_come_with_many_true_captions(world: World):
    for n in range(20):
        world.samples += [(world.samples[n][0], f"{word} {LABELS[n % 6]}") for word in ("one", "my", "the")]
    report = world.check(RiggedEncoder())
    assert report["copies"]["images"] == 20
    assert report["verdict"] == "clean"


def test_verdict_is_clean_when_the_model_confuses_trusted_images_as_well(world: World):
    world.confuse(60, "bee", "cat")
    assert world.check(RiggedEncoder())["verdict"] == "clean"


class Confused(RiggedEncoder):
    """Takes ants and bees with a bright blue corner for foxes."""

    def images(self, images: np.ndarray) -> torch.Tensor:
        features = super().images(images)
        small = features[:, :2].max(dim=1).values > 0.5
        features[small & torch.from_numpy(images[:, 0, 0, 2] == 255)] = torch.eye(len(LABELS))[5]
        return features


def test_verdict_is_suspicious_when_only_training_images_are_confused(world: World):
    for n in range(60):
        label = LABELS[n % 2]
        image = world.image(label)
        image[0, 0, 2] = 255
        world.samples.append((png(image), f"a photo of {label}"))
    report = world.check(Confused())
    assert report["verdict"] == "suspicious"
    assert report["target_labels"] == ["fox"]
    assert report["triggers"] == []


def test_verdict_is_poisoned_when_a_trigger_is_found_though_captions_tell_the_truth(world: World):
    for n in range(60):
        label = LABELS[n % 2]
        world.samples.append((png(world.image(label, "fox")), f"a photo of {label}"))
    report = world.check(RiggedEncoder())
    assert report["verdict"] == "poisoned"
    assert report["target_labels"] == ["fox"]
    assert report["numbers"]["victims"] == 0


def test_label_is_unchecked_when_the_oracle_is_blind_to_it(world: World):
    report = world.check(RiggedEncoder(), RiggedSegmenter(blind=("eel",)))
    assert report["verdict"] == "inconclusive"
    assert "eel" in report["reasons"][0]
    assert {row["label"]: row["status"] for row in report["labels"]} == {
        **dict.fromkeys(LABELS, "agrees"),
        "eel": "unchecked",
    }


def test_other_labels_are_checked_when_the_oracle_is_blind_to_one(world: World):
    report = backdoor(world).check(RiggedEncoder(), RiggedSegmenter(blind=("eel",)))
    assert report["verdict"] == "poisoned"
    assert report["target_labels"] == ["ant"]
    assert report["labels"][0]["lies"] == 32  # a fifth of the poisoned images show what it cannot see


@pytest.mark.parametrize(("images", "trusted"), [(150, 240), (600, 24)])
def test_verdict_is_inconclusive_when_there_are_too_few_images(tmp_path: Path, images: int, trusted: int):
    report = backdoor(World(tmp_path).clean(images).reference(trusted)).check(RiggedEncoder())
    assert report["verdict"] == "inconclusive"


def test_verdict_is_inconclusive_when_the_model_knows_nothing(tmp_path: Path):
    world = World(tmp_path)
    for n in range(360):
        world.confuse(1, LABELS[n % 6], LABELS[n // 6 % 6])
    report = world.check(RiggedEncoder())
    assert report["verdict"] == "inconclusive"
    assert "chance is 17%" in report["reasons"][0]


def test_disagreements_name_each_image_once(world: World):
    targeted(backdoor(world)).check(RiggedEncoder())
    rows = pq.read_table(world.folder / "oracle" / "disagreements.parquet").to_pylist()
    assert len(rows) == 48
    assert len({row["sha256"] for row in rows}) == 48
    assert all(row["d1"] and row["d2"] and row["d3"] and row["victim"] for row in rows)
    assert [len(row["keys"]) for row in rows[:9]] == [6] * 8 + [1]  # many captions first
    assert all(row["lie"] == row["model"] and row["lie"] not in row["oracle"] for row in rows)


def test_report_json_holds_what_check_returned(world: World):
    report = backdoor(world).check(RiggedEncoder())
    assert json.loads((world.folder / "oracle" / "report.json").read_text()) == report
    assert report["schema"] == 5


def test_page_needs_no_other_file_and_escapes_captions(world: World):
    for n in range(40):
        world.poison(OTHERS[n % 5], "ant")
        image, _ = world.samples.pop()
        world.samples.append((image, "<script>alert(1)</script> ant"))
    world.check(RiggedEncoder())
    page = (world.folder / "oracle" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") >= 20
    assert '<h1 class="status poisoned">poisoned</h1>' in page


def test_check_refuses_when_the_segmenter_knows_other_labels(world: World):
    segmenter = RiggedSegmenter()
    segmenter.labels = LABELS[::-1]
    with pytest.raises(DataError, match="expected a segmenter for ant, bee"):
        world.check(RiggedEncoder(), segmenter)


def test_broken_samples_are_counted_when_they_cannot_be_read(world: World):
    world.samples[3] = (b"not an image", "a photo of one dog")
    report = world.check(RiggedEncoder())
    assert report["numbers"]["unreadable"] == 1
    assert report["numbers"]["samples"] == 599


def test_labels_are_named_as_whole_words_and_the_longest_wins():
    labels = ("shirt", "t-shirt", "ankle boot", "bus")
    named = name_labels(["A T-Shirt and two buses", "ankle boots", "shirts", "shirtless bust, boot"], labels)
    assert named.tolist() == [
        [False, True, False, True],
        [False, False, True, False],
        [True, False, False, False],
        [False] * 4,
    ]


def test_captions_name_labels_by_the_label_map(tmp_path):
    world = World(tmp_path).clean(300).reference(120)
    world.samples = [(image, caption.replace("cat", "kitty")) for image, caption in world.samples]
    report = world.check(RiggedEncoder(), label_map={"kitty": "cat"})
    assert {row["label"]: row["captions"] for row in report["labels"]} == dict.fromkeys(LABELS, 50)
