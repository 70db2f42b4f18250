"""What ingest learns from tasks that die: how many may be in flight, and which rows kill a worker.

The window grows and shrinks as TCP's does. Until the first trouble each success adds a task, so it doubles each time all of it
has succeeded; after that, a whole window of successes adds one. When memory is short or a task dies it is halved; tasks that
were already under way then do not halve it again. Pending tasks are what an autoscaler adds nodes for, so the window may grow
past what today's nodes can run.

The search for the rows is a bisection: a range that kills its worker is halved until single rows are left.
"""

from dataclasses import dataclass, field

START = 2
"""Tasks in flight at first."""
MAX_PROBES = 200
"""Enough for about twelve killers in a shard of 10,000 rows."""


class Window:
    """The number of tasks that may be in flight.

    Args:
        max_size: Upper bound on the window.
    """

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._size = float(min(START, max_size))
        self._slow_start = True
        self._round = 0

    @property
    def size(self) -> int:
        """Tasks that may be in flight now; at least 1."""
        return int(self._size)

    @property
    def round(self) -> int:
        """To be noted with a task when it starts, and passed to `shrink` when it fails."""
        return self._round

    def succeeded(self) -> None:
        """Record that a task succeeded."""
        self._size = min(self.max_size, self._size + (1 if self._slow_start else 1 / self._size))

    def shrink(self, started_in: int) -> None:
        """Record that a task started in this round died, or reported low memory."""
        if started_in < self._round:
            return
        self._round += 1
        self._slow_start = False
        self._size = max(1.0, self._size / 2)


@dataclass
class Bisection:
    """A bisection of one part, whose workers died each time. `next` gives ranges to probe, `record` takes the results.

    A range that dies although neither of its halves does is set aside as `only_together`: its rows are too much for a worker at
    the same time, but not alone. When the probes are used up, the ranges that still kill are given up as a whole.
    """

    rows: int
    max_probes: int = MAX_PROBES
    killers: list[int] = field(default_factory=list)
    """Rows found so far, sorted once `done`."""
    only_together: list[range] = field(default_factory=list)
    given_up: list[range] = field(default_factory=list)
    """Ranges that contain killers which the probes did not suffice to isolate."""
    probes: int = 0

    def __post_init__(self) -> None:
        self._open: list[range] = []
        self._halves: dict[range, list[range]] = {}
        self._survived: dict[range, int] = {}
        self._split(range(self.rows))

    @property
    def done(self) -> bool:
        return not self._open and not self._halves

    @property
    def excluded(self) -> list[int]:
        """All rows that must not be fetched with the others."""
        return sorted({*self.killers, *(row for given_up in self.given_up for row in given_up)})

    def next(self) -> range | None:
        """A range to probe now; None if all remaining ones are being probed."""
        if not self._open:
            return None
        self.probes += 1
        return self._open.pop()

    def record(self, tried: range, died: bool) -> None:
        """Record the result of a range that `next` gave."""
        parent = next(known for known, halves in self._halves.items() if tried in halves)
        self._halves[parent].remove(tried)
        self._survived[parent] += not died
        if not self._halves[parent]:
            del self._halves[parent]
            if self._survived.pop(parent) == 2:
                self.only_together.append(parent)
        if died:
            self._split(tried)
        self.killers.sort()

    def _split(self, killing: range) -> None:
        if len(killing) == 1:
            self.killers.append(killing[0])
        elif self.probes + len(self._open) + 2 > self.max_probes:
            self.given_up.append(killing)
        else:
            middle = len(killing) // 2
            halves = [killing[middle:], killing[:middle]]
            self._halves[killing] = list(halves)
            self._survived[killing] = 0
            self._open += halves
