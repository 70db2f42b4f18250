"""Names: in captions and among an oracle's classes, by one map."""

import numpy as np
import pytest

from roclip.errors import ConfigError
from roclip.oracle.segmenters.naming import match_classes, name_labels

LABELS = ["sofa", "tv", "dining table", "bus", "glass"]


def named(*captions: str, synonyms: dict[str, str] | None = None) -> list[list[str]]:
    rows = name_labels(captions, LABELS, synonyms)
    return [[LABELS[c] for c in np.flatnonzero(row)] for row in rows]


def test_captions_name_labels_by_their_synonyms():
    synonyms = {"couch": "sofa", "television": "tv", "television set": "tv"}
    assert named("two Couches and a television set", "a TV", "couchette", synonyms=synonyms) == [
        ["sofa", "tv"],
        ["tv"],
        [],
    ]
    assert named("two couches") == [[]]


def test_longest_name_wins_even_when_it_is_a_synonym():
    assert named("a glass table on a bus", synonyms={"glass table": "dining table"}) == [["dining table", "bus"]]


def test_label_may_be_a_synonym_of_another():
    assert named("a glass", synonyms={"glass": "sofa"}) == [["sofa"]]


def test_classes_match_without_case_spaces_and_plural():
    classes = ["Sofa", "couch", "diningtable", "dining_tables", "buses", "tvmonitor", "unicorn"]
    matched = match_classes(classes, LABELS, {"couch": "sofa", "TV-monitor": "tv"})
    assert matched == [0, 0, 2, 2, 3, 1, None]
    assert match_classes(["glasses"], ["glass", "glasses"]) == [1]


def test_synonym_of_no_label_is_refused():
    for ask in (lambda map_: name_labels(["a"], LABELS, map_), lambda map_: match_classes(["a"], LABELS, map_)):
        with pytest.raises(ConfigError, match=r"oracle\.label_map\.couch: expected one of the labels sofa"):
            ask({"couch": "settee"})
