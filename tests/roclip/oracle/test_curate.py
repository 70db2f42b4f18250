"""Which images a repair learns from: a pass of known content in, the rows of the set out."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scans import made_up

from roclip.errors import DataError
from roclip.found_triggers import Patch
from roclip.oracle.curate import Row, curate, read_plan, write_plan
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.segmenters.base import LabelCalibration
from roclip.oracle.statistics import Observations

LABELS = ("ring", "star", "disc", "cross")
RING, STAR, DISC, CROSS = range(4)
GOOD = LabelCalibration(0.05, 0.05, 1.0, 1.0, 1.0, 1.0, 100, True)
PATCH = Patch(target="ring", crops=(np.zeros((4, 4, 3), np.uint8),))
CLEAN, VICTIMS = 2000, 40


def a_pass() -> tuple[ScanResult, np.ndarray]:
    """2000 honest images of the four labels in turn, then 40 victims that show a star or a star and a disc and are said to
    be a ring, then 100 of which nobody agrees."""
    total = CLEAN + VICTIMS + 100
    answer, clear = np.empty(total, dtype=np.int64), np.zeros((total, 4), dtype=bool)
    named, areas = np.zeros((total, 4), dtype=bool), np.zeros((total, 4), dtype=np.float32)
    honest = np.arange(CLEAN)
    answer[:CLEAN] = honest % 4
    clear[honest, honest % 4] = named[honest, honest % 4] = True
    victims = slice(CLEAN, CLEAN + VICTIMS)
    answer[victims], named[victims, RING] = RING, True
    clear[victims, STAR], clear[CLEAN : CLEAN + VICTIMS : 2, DISC] = True, True
    areas[victims, STAR], areas[CLEAN : CLEAN + VICTIMS : 2, DISC] = 0.1, 0.2
    answer[CLEAN + VICTIMS :], clear[CLEAN + VICTIMS :, DISC], named[CLEAN + VICTIMS :, DISC] = CROSS, True, True
    found = made_up(Observations(answer, clear.copy(), clear, np.arange(total), named), areas)
    targets = np.full(total, -1)
    targets[victims] = RING
    return found, targets


def chosen(**changes) -> list[Row]:
    return curate_of(*a_pass(), **changes)


def curate_of(scan: ScanResult, victims: np.ndarray, **changes) -> list[Row]:
    wanted = {
        "templates": ("a photo of a {}", "{}"),
        "calibration": dict.fromkeys(LABELS, GOOD),
        "targets": ["ring"],
        "frac": 0.1,
        "stamped_frac": 0.4,
        "seed": 0,
        "found": (PATCH,),
    } | changes
    return curate(scan, victims, wanted.pop("found"), LABELS, **wanted)


def test_set_is_as_large_as_it_may_be_and_holds_no_image_twice():
    rows = chosen()
    assert len(rows) == int(0.1 * (CLEAN + VICTIMS + 100)) == 214
    assert len({row.source_sha256 for row in rows}) == len(rows)
    assert Counter(row.role for row in rows) == {"anchor": 89, "stamped": 85, "repaired": 40}
    assert rows == chosen()
    assert rows != chosen(seed=1)


def test_anchors_are_images_on_which_all_agree():
    anchors = [row for row in chosen() if row.role == "anchor"]
    assert all(int(row.key) < CLEAN and row.caption == f"caption {int(row.key)}" for row in anchors)
    assert all(row.label == LABELS[int(row.key) % 4] and row.edit == "none" for row in anchors)
    shares = Counter(row.label for row in anchors)  # ring is the target, star and disc are affected
    assert shares["ring"] == pytest.approx(2 * shares["cross"], abs=2)
    assert shares["star"] == pytest.approx(shares["ring"], abs=1)
    assert shares["disc"] == pytest.approx(shares["ring"], abs=1)


def test_stamped_images_do_not_show_the_target_and_keep_their_caption():
    second = dataclasses.replace(PATCH, target="star")
    stamped = [row for row in chosen(found=(PATCH, second)) if row.role == "stamped"]
    assert Counter(row.trigger for row in stamped) == {0: 42, 1: 43}
    for row in stamped:
        assert (row.trigger, row.target) in ((0, "ring"), (1, "star"))
        assert row.label != row.target
        assert (row.caption, row.edit) == (f"caption {int(row.key)}", "trigger")


def test_victims_are_told_what_the_oracle_sees_of_them_the_largest_first():
    repaired = [row for row in chosen() if row.role == "repaired"]
    assert {row.caption for row in repaired} == {
        "a photo of a star",
        "star",
        "a photo of a disc and star",
        "disc and star",
    }
    assert all(row.target == "ring" and row.edit == "caption" and row.trigger is None for row in repaired)
    assert all(row.lies == ["a photo of a ring", "ring"] for row in repaired)
    assert all(row.truths == [f"a photo of a {row.label}", row.label] for row in repaired)
    assert not any(row.truths or row.lies for row in chosen() if row.role != "repaired")


UNSURE = {**dict.fromkeys(LABELS, GOOD), "disc": dataclasses.replace(GOOD, precision=0.8)}


def test_victims_of_a_found_trigger_are_told_only_what_is_sure():
    explained = a_pass()[1] >= 0
    repaired = [row for row in chosen(calibration=UNSURE, explained=explained) if row.role == "repaired"]
    assert {row.label for row in repaired} == {"star"}
    assert len(repaired) == VICTIMS // 2


def test_victims_that_no_trigger_explains_are_told_the_likeliest_the_sure_ones_first():
    scan, victims = a_pass()
    # A star that is only possible, beside the ring of the lie; the cross is what a blind oracle dreams of.
    hazy = CLEAN + 1
    scan.observations.clear[hazy] = False
    scan.observations.seen[hazy] = True
    scan.areas[hazy, [RING, STAR, DISC, CROSS]] = (0.3, 0.02, 0.01, 0.5)
    blind = {**UNSURE, "cross": dataclasses.replace(GOOD, covered=False)}
    size = {"frac": 30 / len(victims), "stamped_frac": 0.0, "found": (), "calibration": blind}
    few, every = (curate_of(scan, victims, **size | more) for more in ({}, {"frac": 0.1}))
    assert {row.label for row in few if row.role == "repaired"} == {"star"}
    assert hazy not in [int(row.key) for row in few]
    assert len([row for row in every if row.role == "repaired"]) == VICTIMS
    assert [(row.label, row.target) for row in every if int(row.key) == hazy] == [("star", "ring")]


def test_set_without_a_trigger_is_anchors_and_victims():
    rows = chosen(found=(), frac=0.02)
    assert Counter(row.role for row in rows) == {"anchor": 26, "repaired": 16}


def test_set_is_smaller_when_there_are_too_few_images():
    rows = chosen(frac=1.0, stamped_frac=0.5)
    assert Counter(row.role for row in rows) == {"stamped": 1070, "anchor": 930, "repaired": 40}


def test_plan_is_read_as_it_was_written(tmp_path: Path):
    write_plan(tmp_path / "finetune.parquet", chosen())
    assert read_plan(tmp_path / "finetune.parquet") == chosen()
    with pytest.raises(DataError, match="Run `roclip oracle` again"):
        read_plan(tmp_path / "none.parquet")
