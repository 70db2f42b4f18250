"""Caption augmentation: EDA (Wei and Zou, arXiv:1901.11196), drawn for each (seed, epoch, sample).

Each caption gets one of four edits, chosen at random: synonym replacement, random insertion, random swap, random deletion.
Synonyms come from a JSON file of the user, since the packages that offer a list download WordNet at run time or unpickle it.
Without the file the two edits that need synonyms are skipped.
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
    """Edits a caption: (caption, sample id, epoch) -> caption, a pure function, the same on any rank and after a resume."""

    seed: int
    frac: float
    """The paper's alpha: the share of words that an edit changes (at least one word), and the probability of a deletion."""
    static: bool = False
    """Whether a caption gets the same edit in every epoch."""
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __call__(self, caption: str, sample_id: int, epoch: int) -> str:
        key, counter = [self.seed, 0 if self.static else epoch], [0, 0, sample_id, 1]  # augment draws with a 0 there
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        words = caption.split()
        number = max(1, int(self.frac * len(words)))
        edits = [lambda: swap(words, number, generator), lambda: delete(words, self.frac, generator)]
        if self.synonyms:
            edits.append(lambda: replace(words, number, self.synonyms, generator))
            edits.append(lambda: insert(words, number, self.synonyms, generator))
        return " ".join(edits[generator.integers(len(edits))]())


def caption_edits(config: AugmentConfig, seed: int) -> CaptionEdits | None:
    """The caption edits of a config, or None where it has none. Logs a warning where synonyms are missing.

    Raises `ConfigError` for a synonym file that cannot be used.
    """
    strengths = config.strengths()
    if not strengths.caption_edit_frac:
        return None
    synonyms = read_synonyms(Path(config.synonyms)) if config.synonyms else {}
    if not synonyms:
        _log.warning("captions: no augment.synonyms, so synonym replacement and random insertion are skipped")
    return CaptionEdits(seed, strengths.caption_edit_frac, strengths.caption_static, synonyms)


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Read a JSON object of lower-case words and their lists of synonyms. Raises `ConfigError`."""
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
    """Synonym replacement: replace up to `number` different words, stop words excluded, by one of their synonyms each."""
    known = _known(words, synonyms)
    chosen = {known[i]: _pick(synonyms[known[i]], generator) for i in generator.permutation(len(known))[:number]}
    return [chosen.get(_bare(word), word) for word in words]


def insert(
    words: Sequence[str], number: int, synonyms: Mapping[str, Sequence[str]], generator: np.random.Generator
) -> list[str]:
    """Random insertion: insert a synonym of one of the words at a random position, `number` times."""
    known, edited = _known(words, synonyms), list(words)
    for _ in range(number if known else 0):
        word = _pick(synonyms[_pick(known, generator)], generator)
        edited.insert(int(generator.integers(len(edited) + 1)), word)
    return edited


def swap(words: Sequence[str], number: int, generator: np.random.Generator) -> list[str]:
    """Random swap: exchange the words at two different positions, `number` times."""
    edited = list(words)
    for _ in range(number if len(words) > 1 else 0):
        i, j = generator.choice(len(edited), 2, replace=False)
        edited[i], edited[j] = edited[j], edited[i]
    return edited


def delete(words: Sequence[str], probability: float, generator: np.random.Generator) -> list[str]:
    """Random deletion: drop each word with `probability`; at least one word remains."""
    kept = [word for word, draw in zip(words, generator.random(len(words)), strict=True) if draw >= probability]
    return kept or [_pick(words, generator)]


def _known(words: Sequence[str], synonyms: Mapping[str, Sequence[str]]) -> list[str]:
    bare = dict.fromkeys(map(_bare, words))
    return [word for word in bare if word in synonyms and word not in _STOP_WORDS]


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _pick(words: Sequence[str], generator: np.random.Generator) -> str:
    return words[int(generator.integers(len(words)))]
