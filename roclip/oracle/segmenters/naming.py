"""One way to read names: which label of a run a caption's words mean, and which an oracle's class means.

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
    """(M, C) bool: which labels each caption names, as whole words, singular or plural; the longest name wins.

    Args:
        synonyms: Further names and the label that each stands for (`oracle.label_map`); a label that is a name of another
            itself stands for that one. Raises `ConfigError` for one that is no label.
    """
    names = _columns(labels, synonyms)
    named = np.zeros((len(captions), len(labels)), dtype=bool)
    rows, found = find_names(captions, list(names))
    named[rows, np.array(list(names.values()), dtype=np.int64)[found]] = True
    return named


def match_classes(
    classes: Sequence[str], labels: Sequence[str], synonyms: Mapping[str, str] | None = None
) -> list[int | None]:
    """For each of an oracle's K classes the column of the label that it means, or None. Several may mean one.

    Case, spaces, hyphens, underscores and a plural make no difference, unless two labels differ in nothing else. Raises
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
    """Name -> column of the label that it stands for; the labels stand for themselves unless the map says otherwise."""
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
    """The name, and what it may be the plural of."""
    plain = _plain(name)
    return [plain, *(plain.removesuffix(ending) for ending in ("s", "es") if plain.endswith(ending))]
