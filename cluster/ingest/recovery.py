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
    """
    Args:
        most: Never more tasks than this.
    """

    def __init__(self, most: int):
        self.most = most
        self._size = float(min(START, most))
        self._calm = True
        self._round = 0

    @property
    def size(self) -> int:
        """Tasks that may be in flight now; at least 1."""
        return int(self._size)

    @property
    def round(self) -> int:
        """To be noted with a task when it starts, and given back when it has failed."""
        return self._round

    def succeeded(self) -> None:
        """A task has ended well."""
        self._size = min(self.most, self._size + (1 if self._calm else 1 / self._size))

    def shrink(self, started_in: int) -> None:
        """A task that was started in this round died, or said that memory is short."""
        if started_in < self._round:
            return
        self._round += 1
        self._calm = False
        self._size = max(1.0, self._size / 2)


@dataclass
class Bisection:
    """A search in the rows of one part, whose workers died each time. It hands out ranges to try, and is told.

    A range that dies although neither of its halves does is set aside as `together`: its rows are too much for a worker at
    the same time, and none of them alone. When the probes are used up, the ranges that still kill are given up whole.
    """

    rows: int
    max_probes: int = MAX_PROBES
    killers: list[int] = field(default_factory=list)
    """Found so far, ascending once `done`."""
    together: list[range] = field(default_factory=list)
    given_up: list[range] = field(default_factory=list)
    """Ranges in which killers are that the probes did not suffice to tell apart."""
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
    def left_out(self) -> list[int]:
        """All rows that must not be fetched with the others."""
        return sorted({*self.killers, *(row for given_up in self.given_up for row in given_up)})

    def next(self) -> range | None:
        """A range to try now; None when all that can be tried is being tried."""
        if not self._open:
            return None
        self.probes += 1
        return self._open.pop()

    def tell(self, tried: range, died: bool) -> None:
        """What became of a range that `next` gave."""
        parent = next(known for known, halves in self._halves.items() if tried in halves)
        self._halves[parent].remove(tried)
        self._survived[parent] += not died
        if not self._halves[parent]:
            del self._halves[parent]
            if self._survived.pop(parent) == 2:
                self.together.append(parent)
        if died:
            self._split(tried)
        self.killers.sort()

    def _split(self, deadly: range) -> None:
        if len(deadly) == 1:
            self.killers.append(deadly[0])
        elif self.probes + len(self._open) + 2 > self.max_probes:
            self.given_up.append(deadly)
        else:
            middle = len(deadly) // 2
            halves = [deadly[middle:], deadly[:middle]]
            self._halves[deadly] = list(halves)
            self._survived[deadly] = 0
            self._open += halves
