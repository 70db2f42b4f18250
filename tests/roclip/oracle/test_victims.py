"""Who is named a victim, of observations that are made up."""

from collections.abc import Sequence

import numpy as np
import pytest
from scans import made_up

from roclip.found_triggers import Patch, Trial, Warp
from roclip.oracle.statistics import Observations
from roclip.oracle.triggers.search import Search
from roclip.oracle.victims import find_victims

LABELS = 4
RING, STAR, BLIND = 0, 1, 3


def stars(called: Sequence[int], *, unsure: int = 0, captions: int = 1) -> Observations:
    """Pictures of a star with their names in captions, which the model repeats; of the first unsure ones the oracle holds a ring
    for possible."""
    n = len(called)
    clear = np.zeros((n, LABELS), dtype=bool)
    clear[:, STAR] = True
    seen = clear.copy()
    seen[:unsure, RING] = True
    image = np.repeat(np.arange(n), captions)
    return Observations(np.array(called), seen, clear, image, np.eye(LABELS, dtype=bool)[np.array(called)[image]])


def named(copies: Observations, reference: Observations) -> list[bool]:
    """Which of the images with several captions are victims, beside 2000 honest ones with one."""
    n, rest = len(copies.answer), stars([STAR] * 2000)
    seen = Observations(
        *(np.concatenate([getattr(copies, name), getattr(rest, name)]) for name in ("answer", "seen", "clear")),
        np.concatenate([copies.image, rest.image + n]),
        np.concatenate([copies.named, rest.named]),
    )
    pixels = np.empty((0, 8, 8, 3), dtype=np.uint8)
    found = find_victims(made_up(seen), reference, (0, 1, 2), (), lambda rows: pixels, 0.01).named
    assert not found[n:].any()
    return found[:n].tolist()


@pytest.mark.parametrize(("unsure_of_trusted", "expected"), [(0, False), (40, True)])
def test_copy_of_which_the_oracle_is_not_sure_is_named_if_it_misses_as_many(unsure_of_trusted, expected):
    copies = stars([RING] * 16, unsure=1, captions=5)
    assert named(copies, stars([STAR] * 200, unsure=unsure_of_trusted)) == [expected] + [True] * 15


@pytest.mark.parametrize(("honest", "expected"), [(0, True), (40, False)])
def test_copy_that_the_oracle_is_blind_to_is_named_if_the_others_are_lies(honest, expected):
    copies = stars([BLIND] + [RING] * 15 + [STAR] * honest, captions=5)
    assert named(copies, stars([STAR] * 200)) == [expected] + [True] * 15 + [False] * honest


def test_trigger_s_number_counts_the_warps_before_it_that_have_no_evidence():
    none = Trial(0, 0)
    warp = Search(RING, 0, (Warp(target="ring", field=np.zeros((2, 4, 4))),), (), none, none)
    patch = Search(STAR, 0, (Patch(target="star"),), (lambda numbers: np.where(numbers == 7, 1.0, -1.0),), none, none)
    victims = find_victims(
        made_up(stars([STAR] * 300)), stars([STAR] * 200), (0, 1, 2), [warp, patch], lambda rows: rows, 0.01
    )
    assert (victims.target[7], victims.trigger[7]) == (STAR, 1)
    assert (np.delete(victims.trigger, 7) == -1).all()
