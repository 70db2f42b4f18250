"""Captions written for images that have only a class."""

import re

from roclip.attacks.class_captions import ADJECTIVES, SYNONYMS, TEMPLATES, class_captions


def test_captions_are_varied_and_depend_on_labels_and_seed_alone():
    labels = list(SYNONYMS) * 200
    captions = class_captions(labels)
    assert captions == class_captions(labels)
    assert captions != class_captions(labels, seed=1)
    assert len(set(captions)) > 0.6 * len(labels)


def test_caption_names_its_own_class_and_no_other():
    labels = list(SYNONYMS) * 200
    for label, caption in zip(labels, class_captions(labels), strict=True):
        assert any(re.search(rf"\b{word}\b", caption) for word in SYNONYMS[label])
        others = [word for other in SYNONYMS if other != label for word in SYNONYMS[other]]
        assert not [word for word in others if re.search(rf"\b{re.escape(word)}s?\b", caption)]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_every_word_is_used_and_unknown_class_is_called_by_its_name():
    text = " ".join(class_captions(list(SYNONYMS) * 500))
    for word in (*ADJECTIVES, *(word for words in SYNONYMS.values() for word in words)):
        assert word in text
    assert len(TEMPLATES) == len(set(TEMPLATES))
    assert all("teapot" in caption for caption in class_captions(["teapot"] * 20))
