"""Keep a curve of any length in little memory by merging adjacent points as it grows, without losing an extreme."""

from dataclasses import dataclass


@dataclass
class _Group:
    x: float
    low: float
    high: float
    total: float
    points: int = 1


class Thinned:
    """Takes points one by one and keeps at most `2 * limit` groups of adjacent points.

    All groups but the last hold the same number of points, so the result depends on the points alone, not on when they
    arrived.
    """

    def __init__(self, limit: int = 200):
        self._limit, self._points_per_group = limit, 1
        self._groups: list[_Group] = []

    def add(self, x: float, y: float) -> None:
        last = self._groups[-1] if self._groups else None
        if last is not None and last.points < self._points_per_group:
            last.x, last.low, last.high = x, min(last.low, y), max(last.high, y)
            last.total, last.points = last.total + y, last.points + 1
            return
        if len(self._groups) == 2 * self._limit:
            self._halve()
        self._groups.append(_Group(x, y, y, y))

    @property
    def means(self) -> tuple[tuple[float, float], ...]:
        """For each group, (x of the last point, mean of y)."""
        return tuple((group.x, group.total / group.points) for group in self._groups)

    @property
    def reach(self) -> tuple[tuple[float, float], ...]:
        """For each group, (minimum, maximum) of y; empty while every group is a single point."""
        if self._points_per_group == 1:
            return ()
        return tuple((group.low, group.high) for group in self._groups)

    def _halve(self) -> None:
        pairs = zip(self._groups[::2], self._groups[1::2], strict=True)
        self._groups = [
            _Group(b.x, min(a.low, b.low), max(a.high, b.high), a.total + b.total, a.points + b.points)
            for a, b in pairs
        ]
        self._points_per_group *= 2
