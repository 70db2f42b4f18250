"""Side-by-side measurement: ours and the peer in one run, alternating, medians, one JSON object a line and case."""

import json
import statistics
import time
from collections.abc import Callable

Value = Callable[[], float | None]
"""One run: returns what was measured (bytes, a rate, seconds), or None to be timed here, in seconds."""


def measure(
    bench: str,
    case: str,
    unit: str,
    ours: Value,
    peer: Value | float,
    bar: float,
    runs: int = 7,
    lower_is_better: bool = True,
) -> dict:
    """Run both `runs` times after one warm-up each, in turns, and print the medians.

    ratio = peer / ours for what should be small (time, memory), ours / peer for rates: more than 1 means ours is better.
    A number as `peer` is a budget. Who goes first alternates too, so that neither always meets the other's warm caches.
    """
    budget = not callable(peer)
    sides: list[Value] = [ours] if budget else [ours, peer]
    for side in sides:
        _one(side)
    values: list[list[float]] = [[] for _ in sides]
    for number in range(runs):
        for index in range(len(sides)) if number % 2 == 0 else reversed(range(len(sides))):
            values[index].append(_one(sides[index]))
    mine = statistics.median(values[0])
    theirs = float(peer) if budget else statistics.median(values[1])  # pyright: ignore[reportArgumentType]
    better, worse = (mine, theirs) if lower_is_better else (theirs, mine)
    ratio = worse / better if better else float("inf")
    line = {"bench": bench, "case": case, "unit": unit, "ours": mine, "peer": theirs, "ratio": ratio}
    line = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}
    line |= {"bar": bar, "runs": runs}
    print(json.dumps(line), flush=True)
    return line


def _one(side: Value) -> float:
    start = time.perf_counter()
    value = side()
    return time.perf_counter() - start if value is None else float(value)
