"""Caption augmentation: EDA (Wei and Zou, arXiv:1901.11196), drawn for each (seed, epoch, sample).

One of four edits a caption, chosen at random: synonym replacement, random insertion, random swap, random deletion.
Synonyms come from a JSON file of the user's. No package carries a list that could be used: those that exist fetch
WordNet when they run, or unpickle it. Without the file the two edits that need it are skipped.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from roclip.config import AugmentConfig
from roclip.errors import ConfigError

_STOP_TEXT = """
a an the this that these those my your his her its our their and or but if of at by for with about to from in
out on off over under up down into onto near is are was were be been being am has have had do does did it he she
they we you i me him them us who which what where when how not no nor so than too very can will just as there
here all any both each some such
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionEdits:
    """(caption, sample id, epoch) -> the edited caption: a pure function, the same on any rank and after a resume."""

    seed: int
    frac: float
    """alpha of the paper: the share of the words that an edit changes, at least one; the probability of a deletion."""
    static: bool = False
    """Leave the epoch out of the draw."""
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(self, caption: str, sample_id: int, epoch: int) -> str:
        key, counter = [self.seed, 0 if self.static else epoch], [0, 0, sample_id, 1]  # images draw with a 0 there
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        words = caption.split()
        number = max(1, int(self.frac * len(words)))
        edits = [lambda: swap(words, number, generator), lambda: delete(words, self.frac, generator)]
        if self.synonyms:
            edits.append(lambda: replace(words, number, self.synonyms, generator))
            edits.append(lambda: insert(words, number, self.synonyms, generator))
        return " ".join(edits[generator.integers(len(edits))]())


def caption_edits(config: AugmentConfig, seed: int) -> CaptionEdits | None:
    """What the config asks for, or None if captions stay as they are. Says once in the log if synonyms are missing.

    Raises `ConfigError` naming the synonym file that is not as expected.
    """
    strengths = config.strengths()
    if not strengths.caption_edit_frac:
        return None
    synonyms = read_synonyms(Path(config.synonyms)) if config.synonyms else {}
    if not synonyms:
        _log.warning("captions: no augment.synonyms, so synonym replacement and random insertion are skipped")
    return CaptionEdits(seed, strengths.caption_edit_frac, strengths.caption_static, synonyms)


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """A JSON object of lower-case word -> synonyms. Raises `ConfigError`."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"augment.synonyms: expected a JSON file, got {error}.") from error
    if not isinstance(content, dict) or not all(
        isinstance(others, list) and others and all(isinstance(other, str) for other in others)
        for others in content.values()
    ):
        raise ConfigError(f'augment.synonyms: {path}: expected {{"word": ["synonym", …], …}}.')
    return content


def replace(
    words: Sequence[str], number: int, synonyms: Mapping[str, Sequence[str]], generator: np.random.Generator
) -> list[str]:
    """Synonym replacement: up to `number` different words, but no stop words, by one of their synonyms each."""
    known = _known(words, synonyms)
    chosen = {known[i]: _pick(synonyms[known[i]], generator) for i in generator.permutation(len(known))[:number]}
    return [chosen.get(_bare(word), word) for word in words]


def insert(
    words: Sequence[str], number: int, synonyms: Mapping[str, Sequence[str]], generator: np.random.Generator
) -> list[str]:
    """Random insertion: `number` times a synonym of one of the words at a random place."""
    known, edited = _known(words, synonyms), list(words)
    for _ in range(number if known else 0):
        word = _pick(synonyms[_pick(known, generator)], generator)
        edited.insert(int(generator.integers(len(edited) + 1)), word)
    return edited


def swap(words: Sequence[str], number: int, generator: np.random.Generator) -> list[str]:
    """Random swap: `number` times two different places."""
    edited = list(words)
    for _ in range(number if len(words) > 1 else 0):
        i, j = generator.choice(len(edited), 2, replace=False)
        edited[i], edited[j] = edited[j], edited[i]
    return edited


def delete(words: Sequence[str], probability: float, generator: np.random.Generator) -> list[str]:
    """Random deletion: each word with `probability`; one is always left."""
    kept = [word for word, draw in zip(words, generator.random(len(words)), strict=True) if draw >= probability]
    return kept or [_pick(words, generator)]


def _known(words: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> list[str]:
    bare = dict.fromkeys(map(_bare, words))
    return [word for word in bare if word in synonyms and word not in _STOP_WORDS]


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _pick(words: Sequence[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
