import json

import pytest
import torch

from roclip.config import TrainConfig
from roclip.errors import TrainingError
from roclip.training.divergence import LEAST, WINDOW, Divergence

NAMES = [f"00000.tar {number:09d}" for number in range(8)]


def divergence(path, **settings):
    return Divergence(TrainConfig(**settings), path / "diverged.json")


def judge(watch, loss=2.0, norm=1.0, kind="plain"):
    return watch.in_values(kind, torch.tensor(loss), torch.tensor(norm))


def test_what_is_not_finite_is_told_by_name(tmp_path):
    watch = divergence(tmp_path)
    assert judge(watch) == ""
    assert judge(watch, loss=float("nan")) == "loss not finite"
    assert judge(watch, norm=float("inf")) == "gradient norm not finite"
    assert watch.in_features(torch.ones(2, 3), torch.tensor([[0.0, 1.0, float("nan")]])) == "features not finite"
    assert watch.in_features(torch.ones(2, 3), torch.ones(2, 3)) == ""


def test_spikes_are_measured_by_the_median_of_their_kind(tmp_path):
    watch = divergence(tmp_path, spike_factor=3.0)
    for number in range(LEAST):
        assert judge(watch, norm=100.0) == ""  # too few seen
        assert judge(watch, norm=1.0 + number / 100, kind="matched") == ""
    assert judge(watch, norm=299.0) == ""
    assert "gradient norm 4, more than train.spike_factor = 3.0 times the median 1.075" in judge(
        watch, norm=4.0, kind="matched"
    )
    assert "loss 6.1" in judge(watch, loss=6.1, norm=100.0)
    assert judge(divergence(tmp_path), loss=1e9) == ""


def test_a_spike_does_not_become_usual(tmp_path):
    watch = divergence(tmp_path, spike_factor=3.0)
    for _ in range(LEAST):
        judge(watch)
    assert all(judge(watch, norm=5.0) for _ in range(WINDOW))


def test_state_makes_a_resume_judge_alike(tmp_path):
    first, second = (divergence(tmp_path, spike_factor=2.0) for _ in range(2))
    for number in range(WINDOW + 5):
        judge(first, norm=1.0 + number)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for norm in (70.0, 80.0, 90.0):
        assert judge(first, norm=norm) == judge(second, norm=norm)
    assert judge(second, norm=1e3)
    divergence(tmp_path).load_state_dict(divergence(tmp_path).state_dict())


def test_stop_names_the_samples_and_the_file(tmp_path):
    with pytest.raises(
        TrainingError, match=r"step 7: loss not finite, before the update. Samples: 00000.tar 000000000, "
    ):
        divergence(tmp_path).handle(7, "loss not finite", NAMES)
    (record,) = json.loads((tmp_path / "diverged.json").read_text())
    assert record == {"step": 7, "why": "loss not finite", "done": "stop", "samples": NAMES}


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_left_out_steps_are_remembered_and_limited(tmp_path, policy):
    settings = {"on_divergence": policy, "max_left_out": 2}
    watch = divergence(tmp_path, **settings)
    assert watch.handle(3, "loss not finite", NAMES) == (policy == "rollback")
    watch = divergence(tmp_path, **settings)  # as after going back
    assert watch.known(3) == (policy == "rollback")
    assert not watch.known(4)
    watch.handle(3, "loss not finite", NAMES)  # a resume that comes by again counts it once
    watch.handle(5, "loss not finite", NAMES)
    assert watch.left_out == 2
    with pytest.raises(TrainingError, match="More than train\\.max_left_out = 2 steps"):
        watch.handle(6, "loss not finite", NAMES)
