"""Whether an image is memorised, against images of which that is known."""

import dataclasses

import numpy as np
import pytest
from scans import made_up

from roclip.oracle.memory import HONEST, SAMPLE, memorised
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.statistics import Observations

HONEST_EACH, BY_HEART = 200, 20


def a_pass(by_heart: int = BY_HEART) -> ScanResult:
    """Honest images of two labels; then some that are called the second: the model is very sure, and they lie close."""
    rng = np.random.default_rng(0)
    total = 2 * HONEST_EACH + by_heart
    heart = np.arange(total) >= 2 * HONEST_EACH
    answer = np.where(heart, 1, np.arange(total) % 2)
    named = np.eye(2, dtype=bool)[answer]
    clear = named & ~heart[:, None]
    gap = np.where(heart, 0.3, rng.uniform(0.0, 0.3, total))
    features = rng.normal(size=(total, 16))
    features[heart] = features[-1] + 0.01 * features[heart]
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    observations = Observations(answer, clear, clear, np.arange(total), named)
    return made_up(observations, scores=np.stack([gap, np.zeros(total)], axis=1), features=features)


def test_memorised_images_stand_out_and_honest_ones_spread_evenly():
    scan = a_pass()
    found = memorised(scan, np.arange(len(scan.areas)))
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[-BY_HEART:] > 0.95).all()
    honest = found[1 : 2 * HONEST_EACH : 2]
    assert honest.mean() == pytest.approx(0.5, abs=0.05)
    assert (honest > 0.95).mean() < 0.05


def test_nothing_is_said_where_no_honest_image_has_the_answer():
    scan = a_pass()
    scan.observations.answer[-3:] = 0
    nobody = dataclasses.replace(scan.observations, clear=np.zeros_like(scan.observations.clear))
    assert memorised(dataclasses.replace(scan, observations=nobody), np.array([5, -1])).tolist() == [0.5, 0.5]


def test_answer_is_that_of_each_image_alone():
    scan = a_pass()
    rows = np.array([401, 3, 7])
    np.testing.assert_array_equal(memorised(scan, rows), memorised(scan, rows[::-1])[::-1])


def test_no_more_features_are_read_than_a_sample(monkeypatch):
    scan, read = a_pass(5000), []
    features = scan._features
    monkeypatch.setattr("roclip.oracle.memory.HONEST", 50)
    counted = dataclasses.replace(scan, _features=lambda images: read.append(len(images)) or features(images))
    memorised(counted, np.array([401, 402]))
    assert len(scan.areas) > SAMPLE
    assert HONEST > 50
    assert sorted(read) == [2, 50, SAMPLE]
