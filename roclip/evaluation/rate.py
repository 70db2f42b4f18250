"""A share of a count, with its confidence interval. Needs no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """A share with its count and its Wilson 95 % interval."""

    successes: int
    n: int
    rate: float
    ci95: tuple[float, float]


def rate(successes: int, n: int) -> Rate:
    """successes / n with its Wilson score interval at 95 % (Wilson 1927)."""
    if n == 0:
        return Rate(0, 0, 0.0, (0.0, 1.0))
    z = 1.959964
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Rate(successes, n, p, (max(0.0, centre - half), min(1.0, centre + half)))
