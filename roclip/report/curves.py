"""What a chart shows, apart from how it is drawn: the curves of an arm, from its logged steps and its evaluations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#d9622b", "#1f6feb", "#7c3aed", "#0f766e", "#a16207")
"""Of the arms, in their order."""
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
"""Of an evaluation: key, title, and what it counts."""
SHARE_CURVES = ("zero_shot_top1", "linear_probe_top1", "recall_at_1")
ATTACK_SAYS = "attacked images that are taken for the attacker's label"
_MOST_POINTS = 800


@dataclass(frozen=True)
class Curve:
    """One arm in a chart."""

    color: str
    points: Sequence[tuple[float, float]]
    """(epochs done, value)."""
    band: Sequence[tuple[float, float]] = ()
    """95 % interval of each point."""
    filled: Sequence[bool] = ()
    """Whether a point gets a full marker (taken after a matched epoch) or a hollow one; empty is none."""

    @property
    def reach(self) -> Sequence[tuple[float, float]]:
        """(least, greatest) value of each point: its interval, where it has one."""
        return self.band or [(y, y) for _, y in self.points]


def loss_curve(color: str, rows: Sequence[Mapping[str, Any]]) -> Curve:
    """The loss of the logged steps of one arm; of very many, the means of neighbours."""
    points = [(row["progress"], row["loss"]) for row in rows if "loss" in row]
    group = -(-len(points) // _MOST_POINTS) or 1
    pieces = [points[start : start + group] for start in range(0, len(points), group)]
    return Curve(color, [(piece[-1][0], sum(loss for _, loss in piece) / len(piece)) for piece in pieces])


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
    """Names of the attacks in rows that may have `attacks`, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get("attacks") or {}))


def smoothed(points: Sequence[tuple[float, float]], reach: int) -> list[float]:
    """The mean over `reach` neighbours on each side, of the same epoch only: phases differ."""
    means = []
    for i, (progress, _) in enumerate(points):
        window = points[max(0, i - reach) : i + reach + 1]
        values = [value for other, value in window if math.ceil(other) == math.ceil(progress)]
        means.append(sum(values) / len(values))
    return means
