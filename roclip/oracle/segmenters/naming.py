"""Matches the words of captions, and the class names of oracles, to the labels of a run.

Letters: M captions, C labels, K classes of an oracle.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from roclip.data.find_names import find_names
from roclip.errors import ConfigError


def name_labels(
    captions: Sequence[str], labels: Sequence[str], synonyms: Mapping[str, str] | None = None
) -> np.ndarray:
    """Return (M, C) bool: the labels that each caption names, as whole words, singular or plural; the longest name wins.

    Args:
        synonyms: Further names, each with its label (`oracle.label_map`). A label may itself be mapped to another label.

    Raises `ConfigError` for a synonym of no label.
    """
    names = _columns(labels, synonyms)
    named = np.zeros((len(captions), len(labels)), dtype=bool)
    rows, found = find_names(captions, list(names))
    named[rows, np.array(list(names.values()), dtype=np.int64)[found]] = True
    return named


def match_classes(
    classes: Sequence[str], labels: Sequence[str], synonyms: Mapping[str, str] | None = None
) -> list[int | None]:
    """Return for each of an oracle's K classes the index of its label, or None. Several classes may share a label.

    Case, spaces, hyphens, underscores and plurals are ignored, unless two labels differ in nothing else. Raises
    `ConfigError` for a synonym of no label.
    """
    names = _columns(labels, synonyms)
    exact: dict[str, int] = {}
    loose: dict[str, int] = {}
    for name, column in names.items():
        exact.setdefault(_plain(name), column)
        for form in _forms(name):
            loose.setdefault(form, column)
    return [_find(name, exact, loose) for name in classes]


def _find(name: str, exact: Mapping[str, int], loose: Mapping[str, int]) -> int | None:
    if _plain(name) in exact:
        return exact[_plain(name)]
    plural_of = [exact[form] for form in _forms(name) if form in exact]
    return plural_of[0] if plural_of else loose.get(_plain(name))


def _columns(labels: Sequence[str], synonyms: Mapping[str, str] | None) -> dict[str, int]:
    """Map each name to the index of its label; a label stands for itself unless `synonyms` maps it elsewhere."""
    columns = {label: column for column, label in enumerate(labels)}
    renamed = {}
    for name, label in (synonyms or {}).items():
        if label not in columns:
            raise ConfigError(
                f"oracle.label_map.{name}: expected one of the labels {', '.join(labels[:20])}"
                f"{', …' if len(labels) > 20 else ''}, got {label!r}."
            )
        renamed[name] = columns[label]
    return {**columns, **renamed}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _forms(name: str) -> list[str]:
    """Return the normalised name and its possible singulars."""
    plain = _plain(name)
    return [plain, *(plain.removesuffix(ending) for ending in ("s", "es") if plain.endswith(ending))]
