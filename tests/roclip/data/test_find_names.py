"""Names in captions, against the plain way to look for them."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from roclip.data.find_names import find_names, singular

WORDS = (
    "bus",
    "b",
    "bu",
    "ant",
    "ankle boot",
    "boot",
    "t-shirt",
    "shirt",
    "glass",
    "glasses",
    "s",
    "c++",
    "Ärmel",
    "watches",
    "boots",
)


def plainly(captions: list[str], names: list[str]) -> set[tuple[int, int]]:
    """Alternatives one after the other, the longest first."""
    meant = {singular(name): n for n, name in reversed(list(enumerate(names)))}
    meant |= {name.lower(): n for n, name in enumerate(names)}
    forms = sorted(meant, key=lambda form: -len(form))
    ways = "|".join(f"(?P<f{k}>{re.escape(form)}(?:e?s)?)" for k, form in enumerate(forms))
    pattern = re.compile(rf"(?<![\w-])(?:{ways})(?![\w-])", re.IGNORECASE)
    hits = ((row, hit.lastgroup) for row, text in enumerate(captions) for hit in pattern.finditer(text))
    return {(row, meant[forms[int(str(which)[1:])]]) for row, which in hits}


def quickly(captions: list[str], names: list[str]) -> set[tuple[int, int]]:
    rows, found = find_names(captions, names)
    return set(zip(rows.tolist(), found.tolist(), strict=True))


pieces = st.sampled_from([*WORDS, "buses", "BUS", "boots", " ", "-", ", ", "\n", "a", "es", "x", ""])
captions = st.lists(st.lists(pieces, max_size=6).map("".join), max_size=6)


@given(captions, st.lists(st.sampled_from(WORDS), min_size=1, unique=True))
def test_names_are_found_as_the_plain_way_finds_them(texts: list[str], names: list[str]):
    assert quickly(texts, names) == plainly(texts, names)


def test_captions_keep_their_number_when_there_are_many():
    texts = [f"a {'bus' if n % 7 == 0 else 'tree'}" for n in range(2500)]
    rows, found = find_names(texts, ["ant", "bus"])
    np.testing.assert_array_equal(rows, np.arange(0, 2500, 7))
    assert set(found.tolist()) == {1}


def test_singular_of_a_name_is_found_and_a_name_of_its_own_comes_first():
    labels = ["Watches", "glasses", "glass", "Sports Shoes", "bus"]
    texts = ["a steel Watch", "a glass", "two glasses", "one sports shoe", "a bu", "sports"]
    assert quickly(texts, labels) == {(0, 0), (1, 2), (2, 1), (3, 3)}


def test_nothing_is_found_in_no_captions():
    assert quickly([], ["bus"]) == set()
