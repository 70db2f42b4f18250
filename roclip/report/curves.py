"""The contents of a chart, apart from how it is drawn: curves of one arm, from its logged steps and its evaluations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#d9622b", "#1f6feb", "#7c3aed", "#0f766e", "#a16207")
"""Colours of the arms, in their order."""
DARK_COLORS = ("#f08a55", "#5c9bff", "#b18cff", "#34c3b3", "#e0b04a")
"""The same on a dark page."""
SHARES = (
    ("zero_shot_top1", "zero-shot top-1", "held-out images whose nearest label is the true one"),
    ("zero_shot_top5", "zero-shot top-5", "the same among the five nearest labels"),
    ("linear_probe_top1", "linear probe top-1", "held-out images that a linear classifier gets right"),
    (
        "recall_at_1",
        "recall@1",
        "held-out images that find their own caption first, and captions their image",
    ),
    ("recall_at_5", "recall@5", "the same among the first five"),
    ("recall_at_10", "recall@10", "the same among the first ten"),
)
"""Shares in an evaluation: key, title, and what is counted."""
SHARE_CURVES = ("zero_shot_top1", "linear_probe_top1", "recall_at_1")
ATTACK_SAYS = "attacked images that the model takes for the attacker's label"


@dataclass(frozen=True)
class Curve:
    """One arm in a chart."""

    color: str
    points: Sequence[tuple[float, float]]
    """(epochs done, value)."""
    band: Sequence[tuple[float, float]] = ()
    """95 % interval of each point."""
    filled: Sequence[bool] = ()
    """For each point, whether its marker is full (taken after a matched epoch) or hollow; empty for no markers."""

    @property
    def reach(self) -> Sequence[tuple[float, float]]:
        """(minimum, maximum) of each point: its interval, or its value twice."""
        return self.band or [(y, y) for _, y in self.points]


def share_curve(color: str, rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """A share of the evaluated epochs of one arm, such as `zero_shot_top1`."""
    kept = [row for row in rows if row.get(key) is not None]
    filled = [row.get("phase") == "matched" for row in kept]
    return Curve(color, [(row["epoch"], row[key]) for row in kept], filled=filled)


def attack_curve(color: str, rows: Sequence[Mapping[str, Any]], attack: str) -> Curve:
    """The success rate of one attack over the evaluated epochs of one arm, with its interval."""
    kept = [row for row in rows if (row.get("attacks") or {}).get(attack)]
    results = [row["attacks"][attack] for row in kept]
    return Curve(
        color,
        [(row["epoch"], result["rate"]) for row, result in zip(kept, results, strict=True)],
        [tuple(result["ci95"]) for result in results],
        [row.get("phase") == "matched" for row in kept],
    )


def attack_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all attacks in the rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("attacks") or {}))


def smoothed(points: Sequence[tuple[float, float]], reach: int) -> list[float]:
    """The mean over `reach` adjacent points on each side within the same epoch, because phases differ."""
    means = []
    for i, (progress, _) in enumerate(points):
        window = points[max(0, i - reach) : i + reach + 1]
        values = [value for other, value in window if math.ceil(other) == math.ceil(progress)]
        means.append(sum(values) / len(values))
    return means
