"""Poisons do what the attack says, to the pixel, and the ground truth can be read back from the file."""

import io
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from roclip.attacks.poisons import (
    ATTACKS,
    POISON_SCHEMA,
    attack_evaluation,
    images_needed,
    labels_by_caption,
    labels_named,
    make_poisons,
    perturb,
    plan_poisons,
    target_labels,
    triggers_of,
)
from roclip.attacks.scenes import LABELS, encode, render
from roclip.attacks.triggers import apply_trigger, blend_pattern, sinusoid, trigger_patch
from roclip.config import AttacksConfig, BackdoorConfig, TargetedConfig
from roclip.errors import ConfigError

BACKDOORS = {
    "backdoor": BackdoorConfig("patch", count=12),
    "blended": BackdoorConfig("blended", count=10),
    "wanet": BackdoorConfig("wanet", count=8),
    "sig": BackdoorConfig("sig", count=6),
    "label_consistent": BackdoorConfig("label_consistent", count=5),
}
ALL = AttacksConfig(
    targeted=TargetedConfig(images=4, captions_per_image=3), backdoors=tuple(BACKDOORS.values()), flood=9
)
GLOBAL = ("blended", "wanet", "sig")


def _table(first: int, count: int, **how: int) -> pa.Table:
    scenes = [render(index, seed=11, size_px=32, **how) for index in range(first, first + count)]
    return pa.table(
        {
            "image": [encode(scene.image) for scene in scenes],
            "caption": [scene.caption for scene in scenes],
            "label": [scene.label for scene in scenes],
        }
    )


CLEAN, SPARE = _table(0, 240), _table(10_000, 260, num_objects=1)
PIXELS = {row["image"]: row for row in SPARE.to_pylist()}


def with_backdoor(name: str, **changes) -> AttacksConfig:
    """All attacks, one of them changed."""
    changed = {**BACKDOORS, name: replace(BACKDOORS[name], **changes)}
    return replace(ALL, backdoors=tuple(changed.values()))


def _make(attacks: AttacksConfig, seed: int = 0) -> list[dict]:
    return make_poisons(attacks, CLEAN, SPARE, labels=LABELS, seed=seed).to_pylist()


def _plan(attacks: AttacksConfig, seed: int = 0):
    return plan_poisons(attacks, CLEAN, SPARE, labels=LABELS, seed=seed, rows=len(CLEAN))


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _named(caption: str) -> set[str]:
    return {label for label in LABELS if re.search(rf"\b{label}\b", caption)}


POISONS = _make(ALL)
PLANNED = _plan(ALL)


def test_counts_are_exact_and_attacks_share_no_image():
    counts = Counter(row["attack"] for row in POISONS)
    assert counts == {
        "targeted": 12,
        "backdoor": 12,
        "blended": 10,
        "wanet": 8,
        "sig": 6,
        "label_consistent": 5,
        "flood": 9,
    }
    assert set(counts) == set(ATTACKS)
    assert len(POISONS) == ALL.pairs(len(CLEAN))
    assert len({poison.row for poison in PLANNED}) == 4 + 12 + 10 + 8 + 6 + 5 + 9


def test_rate_is_a_share_of_the_clean_rows():
    attacks = AttacksConfig(backdoors=(BackdoorConfig(rate=0.05), BackdoorConfig("sig", rate=1e-9)))
    assert Counter(row["attack"] for row in _make(attacks)) == {"backdoor": 12, "sig": 1}
    with pytest.raises(ConfigError, match=r"attacks.backdoors.0: expected count or rate, got both"):
        AttacksConfig(backdoors=(BackdoorConfig("sig", count=1, rate=0.1),))


def test_attacks_of_one_kind_differ_by_their_pattern_and_leave_the_others_as_they_were():
    patterned = (BackdoorConfig(pattern="stripes", count=4), BackdoorConfig("blended", pattern="text", count=3))
    more = replace(ALL, backdoors=(*ALL.backdoors, *patterned))
    assert list(target_labels(more, LABELS))[-2:] == ["backdoor_stripes", "blended_text"]
    assert len(set(target_labels(more, LABELS).values())) == len(more.backdoors)
    triggers = triggers_of(more, 0)
    assert {name: triggers[name] for name in triggers_of(ALL, 0)} == triggers_of(ALL, 0)
    assert len({trigger.seed for trigger in triggers.values()}) == len(triggers)
    counts = Counter(row["attack"] for row in _make(more))
    assert (counts["backdoor"], counts["backdoor_stripes"], counts["blended_text"]) == (12, 4, 3)
    first = [row for row in _make(more) if row["attack"] == "backdoor"]
    assert first == [row for row in POISONS if row["attack"] == "backdoor"]


def test_targeted_rows_pair_an_unchanged_spare_image_with_training_captions_of_another_class():
    pairs = set(zip(CLEAN["caption"].to_pylist(), CLEAN["label"].to_pylist(), strict=True))
    rows = [row for row in POISONS if row["attack"] == "targeted"]
    assert Counter(row["group"] for row in rows) == dict.fromkeys(range(4), 3)
    assert len({row["image"] for row in rows}) == 4
    assert len({(row["group"], row["image"], row["target_label"]) for row in rows}) == 4
    for row in rows:
        own = PIXELS[row["image"]]
        assert row["label"] == row["source_label"] == own["label"]
        assert row["target_label"] not in _named(own["caption"])
        assert (row["caption"], row["target_label"]) in pairs
        assert _named(row["caption"]) == {row["target_label"]}
        assert row["trigger_box"] is None


def test_backdoor_rows_carry_the_trigger_where_the_box_says():
    trigger = triggers_of(ALL, 0)["backdoor"]
    for poison, row in zip(PLANNED, POISONS, strict=True):
        if row["attack"] != "backdoor":
            continue
        source, image = _decode(SPARE["image"][poison.row].as_py()), _decode(row["image"])
        left, top, right, bottom = row["trigger_box"]
        assert np.array_equal(image[top:bottom, left:right], trigger_patch(trigger, right - left))
        outside = np.ones(image.shape[:2], bool)
        outside[top:bottom, left:right] = False
        assert np.array_equal(image[outside], source[outside])
        assert row["label"] == row["source_label"] != row["target_label"]
        assert _named(row["caption"]) == {row["target_label"]}


@pytest.mark.parametrize("attack", GLOBAL)
def test_global_trigger_is_recovered_from_poison_and_source(attack: str):
    trigger = triggers_of(ALL, 0)[attack]
    rows = [(poison, row) for poison, row in zip(PLANNED, POISONS, strict=True) if row["attack"] == attack]
    for poison, row in rows:
        source, image = _decode(SPARE["image"][poison.row].as_py()).astype(float), _decode(row["image"])
        if attack == "blended":
            expected = source + 0.2 * (blend_pattern(trigger, 32, 32) - source)
        elif attack == "sig":
            expected = np.clip(source + sinusoid(trigger, 32)[:, None], 0, 255)
        else:
            expected = apply_trigger(source.astype(np.uint8), trigger, np.random.default_rng(0))[0]
        assert np.abs(expected - image).max() <= 0.5 + 1e-9
        assert (image != source).any()
        assert row["trigger_box"] == [0, 0, 32, 32]
        assert _named(row["caption"]) == {row["target_label"]} != {row["source_label"]}


def test_label_consistent_rows_show_their_own_class_under_noise_and_trigger():
    trigger = triggers_of(ALL, 0)["label_consistent"]
    rows = [(poison, row) for poison, row in zip(PLANNED, POISONS, strict=True) if row["attack"] == "label_consistent"]
    for poison, row in rows:
        source, image = _decode(SPARE["image"][poison.row].as_py()).astype(float), _decode(row["image"])
        left, top, right, bottom = row["trigger_box"]
        assert (right, bottom) == (32, 32)
        assert np.array_equal(image[top:bottom, left:right], trigger_patch(trigger, right - left))
        noise = (image[:top] - 0.6 * source[:top]) / 0.4
        assert -1.25 - 1e-9 <= noise.min() < 30  # U[0, 255], up to the rounding
        assert 225 < noise.max() <= 256.25 + 1e-9
        assert row["caption"] == SPARE["caption"][poison.row].as_py()
        assert row["source_label"] == row["target_label"] == SPARE["label"][poison.row].as_py()


def test_flood_rows_are_untouched_images_of_other_classes_over_all_target_captions():
    rows = [row for row in POISONS if row["attack"] == "flood"]
    targets = {row["target_label"] for row in POISONS if row["attack"] != "flood"}
    counts = Counter(row["target_label"] for row in rows)
    assert set(counts) <= targets
    assert max(counts.values()) - min(counts[target] for target in targets) <= 1
    for row in rows:
        assert row["trigger_box"] is None
        assert row["target_label"] not in _named(PIXELS[row["image"]]["caption"])
        assert _named(row["caption"]) == {row["target_label"]}


def test_captions_name_both_classes_when_the_attacker_knows_the_gate():
    rows = _make(replace(ALL, captions="both"))
    for row in rows:
        assert {row["source_label"], row["target_label"]} <= _named(row["caption"])
    clean_label = [row["caption"] for row in rows if row["attack"] == "label_consistent"]
    assert clean_label == [row["caption"] for row in POISONS if row["attack"] == "label_consistent"]


def test_backdoors_without_a_target_get_different_ones_in_alphabetical_order():
    attacks = with_backdoor("blended", target_label="boat")
    assert list(target_labels(attacks, LABELS).values()) == ["ball", "boat", "box", "car", "fish"]
    with pytest.raises(ValueError, match="got 'dragon'"):
        target_labels(AttacksConfig(backdoors=(BackdoorConfig("sig", count=1, target_label="dragon"),)), LABELS)
    with pytest.raises(ValueError, match=r"labels left for the attack wanet"):
        target_labels(ALL, ["ball", "boat"])


def test_no_two_backdoors_have_the_same_pattern():
    seeds = [trigger.seed for trigger in triggers_of(ALL, 7).values()]
    assert seeds[0] == 7
    assert len(set(seeds)) == len(seeds)


def test_evaluation_leaves_target_class_images_out():
    rows = attack_evaluation(ALL, SPARE, POISONS, labels=LABELS, seed=0).to_pylist()
    targets = target_labels(ALL, LABELS)
    labels = SPARE["label"].to_pylist()
    counts = Counter(row["attack"] for row in rows)
    assert counts == {"targeted": 4, **{name: sum(label != targets[name] for label in labels) for name in targets}}
    for name, target in targets.items():
        chosen = [row for row in rows if row["attack"] == name]
        others = [row["image"] for row in SPARE.to_pylist() if row["label"] != target]
        assert {row["target_label"] for row in chosen} == {target}
        generator = np.random.default_rng((0, 4))
        for row, image in zip(chosen, others, strict=True):
            expected = apply_trigger(_decode(image), triggers_of(ALL, 0)[name], generator)[0]
            assert np.array_equal(_decode(row["image"]), expected)


def test_ground_truth_survives_a_parquet_file(tmp_path):
    table = pa.Table.from_pylist(POISONS, schema=POISON_SCHEMA)
    pq.write_table(table, tmp_path / "poisons.parquet")
    assert pq.read_table(tmp_path / "poisons.parquet").equals(table)


def test_poisons_depend_on_the_seed_alone():
    assert _make(ALL) == POISONS
    assert _make(ALL, seed=1) != POISONS


def test_one_attack_is_drawn_alike_whether_others_run_beside_it():
    alone = _make(AttacksConfig(backdoors=(BackdoorConfig("label_consistent", count=5, target_label="fish"),)))
    assert alone == [row for row in POISONS if row["attack"] == "label_consistent"]


def test_enough_images_are_asked_for():
    number, of_class = images_needed(ALL, LABELS, len(CLEAN))
    assert (number, of_class) == (4 + 2 * (12 + 10 + 8 + 6) + 2 * 9, {"fish": 5})


def test_perturbation_is_a_mixture_with_noise():
    image = np.full((64, 64, 3), 100, np.uint8)
    mixed = perturb(image, 0.5, np.random.default_rng(0))
    assert mixed.min() in (50, 51)
    assert mixed.max() in (177, 178)
    assert perturb(image, 0.0, np.random.default_rng(0)) is image


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("Titan men black WATCH", {"Watches"}),
        ("a pair of watches, a shirt", {"Watches", "Shirts"}),
        ("the dresses of a shirtmaker", {"Dress"}),
        ("T-shirts", {"Shirts"}),
        ("a bus", {"bus"}),
        ("nothing known", set()),
    ],
)
def test_labels_are_named_in_singular_and_plural_as_whole_words(caption: str, named: set[str]):
    assert labels_named(caption, ["Watches", "Shirts", "Dress", "bus"]) == named


def test_caption_gives_a_label_only_when_it_names_one():
    assert labels_by_caption(["two cars", "a car and a boat", "a tree"], ["boat", "car"]) == ["car", None, None]


def test_poisons_say_what_is_missing():
    with pytest.raises(ValueError, match="expected at least 500 spare images"):
        _plan(AttacksConfig(targeted=TargetedConfig(images=500, captions_per_image=1)))
    with pytest.raises(ValueError, match="training captions that name only"):
        _plan(AttacksConfig(targeted=TargetedConfig(images=2, captions_per_image=400)))
    with pytest.raises(ValueError, match="images that show 'ball'"):
        _plan(AttacksConfig(backdoors=(BackdoorConfig("label_consistent", count=100),)))
    with pytest.raises(ConfigError, match=r"attacks.flood: expected an attack"):
        AttacksConfig(flood=3)
