"""Requests and their outcomes per host, in a bounded table that can be merged over any number of shards and hosts.

The Space-Saving algorithm (Metwally, Agrawal, El Abbadi 2005) in batches: beyond twice its capacity the table keeps the hosts
with the most URLs. A host in the table may have been dropped earlier, with at most `missed` URLs; a host that is not in the
table had at most `floor` URLs. Merged tables (Agarwal et al. 2012) keep these bounds. Totals over all hosts are exact.
"""

import operator
from typing import NamedTuple

CAPACITY = 4096


class HostCount(NamedTuple):
    """The counts of one host, or of all hosts together."""

    requests: int = 0
    """Requests made, whatever their outcome."""
    failures: int = 0
    """Requests without any response."""
    busy: int = 0
    """Responses 429 and 503."""
    refused: int = 0
    """URLs that got no permit: host_busy, host_down."""
    seconds: float = 0.0
    """Total time of the requests."""
    bytes: int = 0
    missed: int = 0
    """Upper bound on the URLs that are missing from these counts."""

    @property
    def urls(self) -> int:
        """URLs that requested a permit."""
        return self.requests + self.refused

    def plus(self, other: "HostCount") -> "HostCount":
        return HostCount._make(map(operator.add, self, other))


class HostCounts:
    """Counts by host. Not thread-safe; can be pickled."""

    def __init__(self, capacity: int = CAPACITY):
        self.capacity = capacity
        self.total = HostCount()
        self.floor = 0
        self._hosts: dict[str, HostCount] = {}

    def add(self, host: str, count: HostCount) -> None:
        """Add to the counts of a host."""
        self.total = self.total.plus(count)
        self._hosts[host] = self._hosts.get(host, HostCount(missed=self.floor)).plus(count)
        if len(self._hosts) > 2 * self.capacity:
            self._prune()

    def merge(self, other: "HostCounts") -> None:
        """Add the counts of another table."""
        for host in self._hosts.keys() | other._hosts.keys():
            here = self._hosts.get(host, HostCount(missed=self.floor))
            self._hosts[host] = here.plus(other._hosts.get(host, HostCount(missed=other.floor)))
        self.total = self.total.plus(other.total)
        self.floor += other.floor
        if len(self._hosts) > 2 * self.capacity:
            self._prune()

    def top(self, number: int, by: str = "urls") -> dict[str, HostCount]:
        """The `number` hosts with the highest value of `by`, a field of `HostCount` or `urls`, in descending order."""
        ranked = sorted(self._hosts.items(), key=lambda item: (-getattr(item[1], by), item[0]))
        return dict(ranked[:number])

    def as_dict(self) -> dict:
        """As JSON values, which `from_dict` reads."""
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
        ranked = sorted(self._hosts.items(), key=lambda item: (-item[1].urls - item[1].missed, item[0]))
        self.floor = max(self.floor, *(count.urls + count.missed for _, count in ranked[self.capacity :]))
        self._hosts = dict(ranked[: self.capacity])
