"""A curve of any length in little memory: neighbours are put together as it grows, and no extreme is lost."""

from dataclasses import dataclass


@dataclass
class _Group:
    x: float
    low: float
    high: float
    total: float
    points: int = 1


class Thinned:
    """Takes points one by one and keeps at most `2 * limit` groups of neighbours.

    A group holds as many points as every other but the last, so what is kept depends on the points alone, not on when
    they came.
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
        """(x of its last point, mean of y) of each group."""
        return tuple((group.x, group.total / group.points) for group in self._groups)

    @property
    def reach(self) -> tuple[tuple[float, float], ...]:
        """(least, greatest y) of each group; empty as long as each is one point."""
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
