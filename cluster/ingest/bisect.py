"""Finds the rows that kill a worker: a range of rows that does is halved until single rows are left."""

from dataclasses import dataclass, field

MAX_PROBES = 200
"""About twelve killers in a shard of 10,000 rows."""


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
