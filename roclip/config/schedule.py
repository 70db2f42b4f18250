"""Which steps are matched: a pure function of the position in training, so that a resumed run has the same phases.

Periods are durations, since a stream may have no epochs and a large data set has few: `2 epochs`, `5_000_000 samples`,
`1000 steps`; a bare number means epochs. Fractions are exact, so that no step falls on the wrong side of a boundary.
Positions count over all ranks, so the number of ranks does not matter. Imports no torch.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from roclip.errors import ConfigError

Phase = Literal["matched", "plain"]
_UNITS = ("epochs", "samples", "steps")
_PERIODS_LOOKED_AT = 1000
"""Periods of an epoch that are examined: a plan of 10^10 steps must not take a day, and later periods are alike."""


@dataclass(frozen=True)
class Position:
    """How far training has come before a step."""

    step: int
    """Optimizer steps."""
    samples_seen: int
    """Samples seen, over all ranks."""
    epoch: int
    """The current epoch, from 1."""
    step_in_epoch: int
    """Steps of this epoch that are done."""
    steps_per_epoch: int
    """Steps that this epoch has."""

    def done(self, unit: str) -> Fraction:
        """The position in `epochs`, `samples` or `steps`."""
        if unit == "epochs":
            return self.epoch - 1 + Fraction(self.step_in_epoch, self.steps_per_epoch)
        return Fraction(self.samples_seen if unit == "samples" else self.step)


@dataclass(frozen=True)
class Duration:
    """A number of epochs, samples or steps."""

    amount: Fraction
    unit: str


def duration(value: int | str, key: str = "duration") -> Duration:
    """Parse `2`, `2 epochs`, `0.5 epochs`, `5_000_000 samples` or `1000 steps`. Raises `ConfigError` that names `key`."""
    parts = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
    unit = "" if parts is None else f"{parts[2].removesuffix('s') or 'epoch'}s"
    if parts is None or unit not in _UNITS:
        raise ConfigError(f"{key}: expected such as '2 epochs', '5_000_000 samples' or '1000 steps', got {value!r}.")
    amount = Fraction(parts[1].replace("_", ""))
    if unit != "epochs" and amount.denominator != 1:
        raise ConfigError(f"{key}: expected whole {unit}, got {value!r}.")
    return Duration(amount, unit)


@dataclass(frozen=True)
class Schedule:
    """Matched and plain phases. Of each period of length T, counted from the start of the run, the last share f is matched:

    matched at x  <=>  x >= warm-up  and  (x mod T) >= (1 - f) T,   x: the position before the step
    """

    period: Duration
    """T; 0 turns matching off."""
    share: Fraction
    """f, from 0 to 1."""
    warmup: Duration
    """Length of the start in which nothing is matched, in a unit of its own."""

    @classmethod
    def of(cls, match_every: int | str, match_frac: float = 0.0, warmup: int | str = 0) -> "Schedule":
        """Build a schedule from config values. A `match_frac` of 0 is the last epoch or step of a period, or half of a period
        of samples.

        So `2 epochs` matches every second epoch, as the paper does, and `2 steps` every second step.
        """
        period, delay = duration(match_every, "pool.match_every"), duration(warmup, "pool.warmup")
        share = Fraction(str(match_frac))
        if not 0 <= share <= 1:
            raise ConfigError(f"pool.match_frac: expected a share from 0 to 1, got {match_frac}.")
        if not share:
            share = Fraction(1, 2) if period.unit == "samples" else 1 / max(period.amount, Fraction(1))
        return cls(period, share, delay)

    def phase(self, at: Position) -> Phase:
        """The phase of the step that begins at `at`."""
        length = self.period.amount
        if not length or at.done(self.warmup.unit) < self.warmup.amount:
            return "plain"
        left = length - at.done(self.period.unit) % length
        return "matched" if left <= length * self.share else "plain"

    def turns(self, epoch: int, steps: int, global_batch_size: int) -> Iterator[Position]:
        """The first step of an epoch, and all further ones at which its phase or the warm-up may change.

        Nothing changes between two of them, so a few steps describe an epoch of any length. All epochs are assumed to have
        as many steps as this one.
        """
        before = (epoch - 1) * steps
        stride = {"epochs": Fraction(1, steps), "samples": Fraction(global_batch_size), "steps": Fraction(1)}
        unit = self.period.unit
        points = [(unit, x) for x in self._boundaries(before * stride[unit], (before + steps) * stride[unit])]
        points.append((self.warmup.unit, self.warmup.amount))
        numbers = {0} | {math.ceil(x / stride[unit]) - before for unit, x in points}
        for number in sorted(numbers):
            if 0 <= number < steps:
                done = before + number
                yield Position(done, done * global_batch_size, epoch, number, steps)

    def _boundaries(self, start: Fraction, end: Fraction) -> Iterator[Fraction]:
        """Where matched parts begin and end between two positions in the period's unit; at most the first thousand periods."""
        length = self.period.amount
        if not length:
            return
        first = start // length
        for number in range(first, min(math.ceil(end / length), first + _PERIODS_LOOKED_AT)):
            yield (number + 1 - self.share) * length
            yield (number + 1) * length
