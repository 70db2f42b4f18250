import json

import numpy as np
import pytest
import torch

from roclip.config import AugmentConfig
from roclip.data import eda
from roclip.data.eda import CaptionEdits, caption_edits
from roclip.data.shards import Manifest
from roclip.data.stream import Stream, StreamSettings, take_snapshot
from roclip.errors import ConfigError

CAPTION = "a small red car and a big dog near the old house"
WORDS = CAPTION.split()
SYNONYMS = {"car": ["auto", "vehicle"], "dog": ["hound"], "small": ["little"], "the": ["never"], "house": ["home"]}
NEW = {"auto", "vehicle", "hound", "little", "home"}


def draw(number=0):
    return np.random.default_rng(number)


@pytest.mark.parametrize("number", [1, 2, 9])
def test_replacement_changes_so_many_words_but_no_stop_word(number):
    for seed in range(20):
        edited = eda.replace(WORDS, number, SYNONYMS, draw(seed))
        changed = [(old, new) for old, new in zip(WORDS, edited, strict=True) if old != new]
        assert len(changed) == min(number, 4)
        assert all(new in SYNONYMS[old] and old != "the" for old, new in changed)


def test_replacement_changes_all_places_of_a_word_and_sees_through_punctuation():
    assert eda.replace(["Dog,", "dog"], 1, SYNONYMS, draw()) == ["hound", "hound"]
    assert eda.replace(["cat"], 1, SYNONYMS, draw()) == ["cat"]


def test_insertion_adds_so_many_synonyms_and_keeps_the_rest():
    edited = eda.insert(WORDS, 3, SYNONYMS, draw())
    assert len(edited) == len(WORDS) + 3
    assert [word for word in edited if word not in NEW] == WORDS
    assert eda.insert(["cat"], 3, SYNONYMS, draw()) == ["cat"]


def test_swap_moves_two_words_a_time():
    for seed in range(20):
        edited = eda.swap(WORDS, 1, draw(seed))
        assert sorted(edited) == sorted(WORDS)
        assert sum(old != new for old, new in zip(WORDS, edited, strict=True)) in (0, 2)  # 0: the two "a"
    assert eda.swap(["cat"], 3, draw()) == ["cat"]


def test_deletion_leaves_the_given_share_and_never_nothing():
    lengths = [len(eda.delete(WORDS, 0.25, draw(seed))) for seed in range(400)]
    assert np.mean(lengths) == pytest.approx(0.75 * len(WORDS), rel=0.03)
    assert eda.delete(["cat"], 1.0, draw()) == ["cat"]


def test_each_edit_is_chosen_about_equally_often():
    edits = CaptionEdits(0, 0.1, synonyms=SYNONYMS)
    kinds = {"longer": 0, "shorter": 0, "replaced": 0, "moved": 0}
    for number in range(2000):
        words = edits(CAPTION, number, 1).split()
        if len(words) > len(WORDS):
            kinds["longer"] += 1
        elif len(words) < len(WORDS):
            kinds["shorter"] += 1
        elif NEW & set(words):
            kinds["replaced"] += 1
        else:
            kinds["moved"] += 1  # and the deletions that took nothing: 0.9 ** 12 of them
    assert kinds["longer"] == pytest.approx(500, rel=0.15)
    assert kinds["replaced"] == pytest.approx(500, rel=0.15)
    assert kinds["shorter"] == pytest.approx(500 * (1 - 0.9**12), rel=0.15)


def test_an_edit_depends_on_seed_sample_and_epoch_only():
    fresh, static = CaptionEdits(1, 0.3), CaptionEdits(1, 0.3, static=True)
    assert fresh(CAPTION, 5, 2) == fresh(CAPTION, 5, 2)
    assert len({fresh(CAPTION, 5, epoch) for epoch in range(8)}) > 4
    assert len({fresh(CAPTION, number, 1) for number in range(8)}) > 4
    assert len({CaptionEdits(seed, 0.3)(CAPTION, 5, 1) for seed in range(8)}) > 4
    assert len({static(CAPTION, 5, epoch) for epoch in range(8)}) == 1


def test_config_says_whether_captions_are_edited_and_what_is_skipped(tmp_path, caplog):
    assert caption_edits(AugmentConfig(), 0) is None
    edits = caption_edits(AugmentConfig(preset="paper"), 3)
    assert edits is not None
    assert (edits.seed, edits.frac, edits.static) == (3, 0.1, True)
    assert caplog.text.count("synonym replacement and random insertion are skipped") == 1
    (tmp_path / "synonyms.json").write_text(json.dumps(SYNONYMS))
    edits = caption_edits(AugmentConfig(caption_edit_frac=0.2, synonyms=str(tmp_path / "synonyms.json")), 3)
    assert edits is not None
    assert edits.synonyms == SYNONYMS
    assert caplog.text.count("skipped") == 1


@pytest.mark.parametrize("content", ["[]", '{"a": "b"}', '{"a": []}', "nothing"])
def test_a_synonym_file_that_is_not_as_expected_is_named(content, tmp_path):
    (tmp_path / "synonyms.json").write_text(content)
    with pytest.raises(ConfigError, match=r"augment\.synonyms: .*expected"):
        eda.read_synonyms(tmp_path / "synonyms.json")


def codes(captions):
    rows = torch.zeros(len(captions), 200, dtype=torch.int64)
    for row, caption in enumerate(captions):
        rows[row, : len(caption)] = torch.tensor([ord(letter) for letter in caption])
    return rows


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), (1, 1)])
def test_stream_gives_the_same_edited_captions_to_any_number_of_ranks(world_size, workers, shards):
    def tokens(edit, rank=0, ranks=1, workers=0):
        stream = Stream(
            shards,
            StreamSettings(64, 24, seed=0, streams=4, shuffle_buffer=16, workers=workers),
            tokenize=codes,
            rank=rank,
            world_size=ranks,
            edit=edit,
        )
        return [batch.tokens for batch in stream.epoch(take_snapshot(Manifest(shards)), 2)]

    edits = CaptionEdits(0, 0.2)
    alone = tokens(edits)
    ranks = [tokens(edits, rank, world_size, workers) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        assert torch.equal(torch.cat([rank[number] for rank in ranks]), batch)
    assert not all(torch.equal(a, b) for a, b in zip(alone, tokens(None), strict=True))
