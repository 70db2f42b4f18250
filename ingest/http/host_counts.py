"""Which hosts were asked how often, and what came of it: a bounded table that merges, over any number of shards and hosts.

Space-saving (Metwally, Agrawal, El Abbadi 2005) in batches: beyond twice its capacity the table keeps the hosts most asked for.
A host that comes (back) in later may have been dropped before, asked for at most `missed` times; a host that is not in the
table, at most `floor` times. Tables merge (Agarwal et al. 2012) with the same promise. Totals over all hosts are exact.
"""

import operator
from typing import NamedTuple

CAPACITY = 4096


class HostCount(NamedTuple):
    """What is known of one host, or of all."""

    requests: int = 0
    """Turns that were used, whatever came of them."""
    failures: int = 0
    """Requests without any answer."""
    busy: int = 0
    """Answers 429 and 503."""
    refused: int = 0
    """URLs that got no turn: host_busy, host_down."""
    seconds: float = 0.0
    """Time that the requests took, added up."""
    bytes: int = 0
    missed: int = 0
    """How often it may have been asked for beyond that, at most."""

    @property
    def asked(self) -> int:
        """URLs that wanted a turn."""
        return self.requests + self.refused

    def plus(self, other: "HostCount") -> "HostCount":
        return HostCount._make(map(operator.add, self, other))


class HostCounts:
    """Counts by host. Not thread-safe; may be pickled."""

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.total = HostCount()
        self.floor = 0
        self._hosts: dict[str, HostCount] = {}

    def add(self, host: str, count: HostCount) -> None:
        """Count what happened at a host."""
        self.total = self.total.plus(count)
        self._hosts[host] = self._hosts.get(host, HostCount(missed=self.floor)).plus(count)
        if len(self._hosts) > 2 * self.capacity:
            self._prune()

    def merge(self, other: "HostCounts") -> None:
        """Count in what another table has counted."""
        for host in self._hosts.keys() | other._hosts.keys():
            here = self._hosts.get(host, HostCount(missed=self.floor))
            self._hosts[host] = here.plus(other._hosts.get(host, HostCount(missed=other.floor)))
        self.total = self.total.plus(other.total)
        self.floor += other.floor
        if len(self._hosts) > 2 * self.capacity:
            self._prune()

    def top(self, number: int, by: str = "asked") -> dict[str, HostCount]:
        """The hosts with the most of something (a field of `HostCount`, or `asked`), the greatest first."""
        ranked = sorted(self._hosts.items(), key=lambda item: (-getattr(item[1], by), item[0]))
        return dict(ranked[:number])

    def as_dict(self) -> dict:
        """For JSON: `from_dict` reads it."""
        hosts = {host: count._asdict() for host, count in self._hosts.items()}
        return {"capacity": self.capacity, "total": self.total._asdict(), "floor": self.floor, "hosts": hosts}

    @staticmethod
    def from_dict(saved: dict) -> "HostCounts":
        counts = HostCounts(saved["capacity"])
        counts.total, counts.floor = HostCount(**saved["total"]), saved["floor"]
        counts._hosts = {host: HostCount(**count) for host, count in saved["hosts"].items()}
        return counts

    def __len__(self) -> int:
        return len(self._hosts)

    def _prune(self) -> None:
        ranked = sorted(self._hosts.items(), key=lambda item: (-item[1].asked - item[1].missed, item[0]))
        self.floor = max(self.floor, *(count.asked + count.missed for _, count in ranked[self.capacity :]))
        self._hosts = dict(ranked[: self.capacity])
