"""Who is named a victim, of observations that are made up."""

import numpy as np
import pytest
from looks import made_up

from roclip.oracle.statistics import Observations
from roclip.oracle.victims import find_victims

LABELS, COPIES = 4, 5
RING, STAR = 0, 1
SURE, UNSURE = 15, 1


def observed(answers, named, *, unsure=(), captions=1) -> Observations:
    """Pictures of a star; of the unsure ones the oracle holds a ring for possible."""
    n = len(answers)
    clear = np.zeros((n, LABELS), dtype=bool)
    clear[:, STAR] = True
    seen = clear.copy()
    seen[list(unsure), RING] = True
    image = np.repeat(np.arange(n), captions)
    return Observations(np.array(answers), seen, clear, image, np.eye(LABELS, dtype=bool)[np.array(named)[image]])


def victims_with(unsure_of_trusted: int) -> np.ndarray:
    """Of 16 pictures of stars with five captions each that say ring, as the model does; the oracle holds one for possible. So
    many of 200 trusted pictures that are rings look to the oracle like stars, rings perhaps."""
    lied = observed([RING] * 16, [RING] * 16, unsure=[15], captions=COPIES)
    rest = observed([STAR] * 2000, [STAR] * 2000)
    seen = Observations(
        *(np.concatenate([getattr(lied, name), getattr(rest, name)]) for name in ("answer", "seen", "clear")),
        np.concatenate([lied.image, rest.image + 16]),
        np.concatenate([lied.named, rest.named]),
    )
    few = [RING] * unsure_of_trusted
    reference = observed([*few, *[STAR] * (200 - len(few))], [*few, *[STAR] * (200 - len(few))], unsure=range(len(few)))
    nothing = np.empty((0, 8, 8, 3), dtype=np.uint8)
    return find_victims(made_up(seen), reference, range(LABELS), (), lambda rows: nothing, 0.01).named


def test_copies_that_are_lied_about_are_named():
    named = victims_with(0)
    assert named[:SURE].all()
    assert not named[16:].any()


@pytest.mark.parametrize(("of_trusted", "is_named"), [(0, True), (2, True), (40, False)])
def test_a_copy_that_the_oracle_is_not_sure_of_is_named_where_chance_adds_few(of_trusted, is_named):
    assert victims_with(of_trusted)[SURE] == is_named
