import itertools
import subprocess
import sys
from fractions import Fraction

import pytest
from kit import environment

from roclip.config.schedule import Duration, Position, Schedule, duration
from roclip.errors import ConfigError


def phases(schedule: Schedule, epochs: int, steps: int = 4, batch: int = 10) -> str:
    """First letters of the phases, epoch by epoch."""
    return " ".join("".join(schedule.phase(at)[0] for at in positions(e, steps, batch)) for e in range(1, epochs + 1))


def positions(epoch: int, steps: int, batch: int) -> list[Position]:
    before = (epoch - 1) * steps
    return [Position(before + step, (before + step) * batch, epoch, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("match_every", "warmup", "expected"),
    [(2, 1, "pmpmpm"), (3, 1, "ppmppm"), (1, 2, "ppmmmm"), (0, 0, "pppppp"), (2, 3, "pppmpm"), (1, 0, "mmmmmm")],
)
def test_every_kth_epoch_is_matched_after_the_warm_up(match_every, warmup, expected):
    for value, delay in itertools.product((match_every, f"{match_every} epochs"), (warmup, f"{warmup} epochs")):
        found = phases(Schedule.of(value, warmup=delay), 6)
        assert [set(epoch) for epoch in found.split()] == [{letter} for letter in expected]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"match_every": "2 steps"}, "pmpm pmpm pmpm"),
        ({"match_every": "3 steps"}, "ppmp pmpp mppm"),
        ({"match_every": "4 steps", "match_frac": 0.5}, "ppmm ppmm ppmm"),
        ({"match_every": "2 steps", "warmup": "5 steps"}, "pppp pmpm pmpm"),
        ({"match_every": "2 steps", "warmup": "1.25 epochs"}, "pppp pmpm pmpm"),
        ({"match_every": "60 samples"}, "pppm mmpp pmmm"),
        ({"match_every": "60 samples", "match_frac": 0.2, "warmup": "60 samples"}, "pppp pppp pppm"),
        ({"match_every": "1 epochs", "match_frac": 0.25}, "pppm pppm pppm"),
        ({"match_every": "2 epochs", "match_frac": 0.75}, "ppmm mmmm ppmm"),
        ({"match_every": "1 epoch", "match_frac": 1.0, "warmup": "1_000 samples"}, "pppp pppp pppp"),
    ],
)
def test_periods_of_steps_samples_and_shares(settings, expected):
    assert phases(Schedule.of(**settings), 3) == expected


@pytest.mark.parametrize("match_every", ["2", "0", "3 steps", "60 samples", "1000 samples", "0.3 epochs"])
@pytest.mark.parametrize("warmup", ["1", "5 steps", "35 samples", "0.5 epochs"])
@pytest.mark.parametrize("match_frac", [0.0, 0.2, 0.7, 1.0])
def test_phases_change_only_at_the_turns(match_every, warmup, match_frac):
    schedule = Schedule.of(match_every, match_frac, warmup)
    for epoch in (1, 2, 5):
        turns = {at.step for at in schedule.turns(epoch, steps=9, global_batch_size=10)}
        everywhere = positions(epoch, steps=9, batch=10)
        assert everywhere[0].step in turns
        for before, at in itertools.pairwise(everywhere):
            if at.step not in turns:
                assert schedule.phase(at) == schedule.phase(before)
                delay = schedule.warmup
                assert (at.done(delay.unit) < delay.amount) == (before.done(delay.unit) < delay.amount)


def test_an_epoch_of_any_length_has_few_turns():
    for period in ("2", "2 steps", "5_000_000 samples"):
        schedule = Schedule.of(period, warmup="1000 steps")
        turns = list(schedule.turns(1, steps=10**11, global_batch_size=512))
        assert len(turns) < 3000
        assert {schedule.phase(at) for at in turns} == ({"plain"} if period == "2" else {"plain", "matched"})


def test_a_step_that_begins_on_the_boundary_is_matched():
    schedule = Schedule.of("1 epochs", match_frac=0.3)  # in floats 1 * (1 - 0.3) is more than 7 / 10
    assert phases(schedule, 1, steps=10) == "pppppppmmm"


def test_phase_is_the_same_from_any_starting_point_and_with_epochs_of_any_length():
    schedule = Schedule.of("7 steps", 0.4, "10 steps")
    whole = phases(schedule, 1, steps=60, batch=3)
    for steps in (4, 5, 12):
        assert phases(schedule, 60 // steps, steps, 3).replace(" ", "") == whole
    assert schedule.phase(Position(33, 99, 1, 33, 60))[0] == whole[33]


def test_durations_are_read_or_refused():
    assert duration(2) == duration("2") == duration("2 epochs") == Duration(Fraction(2), "epochs")
    assert duration("5_000_000 samples") == Duration(Fraction(5_000_000), "samples")
    assert duration("1 step") == Duration(Fraction(1), "steps")
    assert duration("0.5epochs") == Duration(Fraction(1, 2), "epochs")
    for wrong in ("two epochs", "2 weeks", "-1", "1.5 steps", "", "epochs", "2 epochs 3"):
        with pytest.raises(ConfigError, match=r"pool\.warmup"):
            duration(wrong, "pool.warmup")
    with pytest.raises(ConfigError, match=r"pool\.match_frac"):
        Schedule.of(2, match_frac=1.5)


def test_schedule_loads_no_torch():
    code = "import roclip.config.schedule, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
