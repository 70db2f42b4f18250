"""The progress of an ingest: counted shard by shard, and as a line of text."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roclip.data.outcomes import REASONS, is_transient
from roclip.data.shards import ShardRecord


@dataclass(frozen=True)
class IngestProgress:
    """The progress of an ingest. Counts cover all sealed shards, rates the shards that this call has sealed."""

    done_urls: int
    """Rows of the list; a row that was fetched again counts once."""
    total_urls: int | None
    """None until it is known."""
    succeeded: int
    """Usable samples."""
    failed: dict[str, int]
    """Rows without a sample, by the reason of their last failure."""
    shards: int
    total_shards: int | None
    images_per_s: float
    eta_s: float | None
    """Seconds left for the list or the later pass at this rate; None until there is a rate."""
    published: int = 0
    """Shards that training may read; fewer than `shards` while `ingest.quarantine` holds them."""
    pass_number: int = 0
    """0 for the list itself, then the number of the later pass over what failed."""
    again_done: int = 0
    again_total: int = 0
    """Rows of the later pass."""
    duplicates: int | None = None
    """Samples equal to an earlier one, if known."""
    estimated: bool = False
    """Whether `total_urls` is estimated from the part of the list that was read."""

    @property
    def refused(self) -> int:
        """Rows that a rule refused."""
        return sum(rows for reason, rows in self.failed.items() if reason in REASONS and REASONS[reason].refused)


def describe(now: IngestProgress) -> str:
    """Counts, rate, success and the most frequent failures in one line."""
    rate = now.succeeded / now.done_urls if now.done_urls else 0.0
    reasons = ", ".join(f"{name} {rows}" for name, rows in Counter(now.failed).most_common(3))
    about = "~" if now.estimated else ""
    urls = f"{now.done_urls}/{about}{'?' if now.total_urls is None else now.total_urls} URLs"
    shards = f"{now.shards}/{about}{'?' if now.total_shards is None else now.total_shards} shards"
    again = f"  pass {now.pass_number}: {now.again_done}/{now.again_total} again" if now.pass_number else ""
    refused = f"  {now.refused} refused" if now.refused else ""
    twice = f"  {now.duplicates} duplicates" if now.duplicates else ""
    done = now.done_urls == now.total_urls and now.again_done == now.again_total
    left = f"  {now.eta_s:.0f} s left" if now.eta_s and not done else ""
    return (
        f"{urls}  {shards}{again}  {now.images_per_s:.0f} images/s  "
        f"{rate:.1%} usable{f' ({reasons})' if reasons else ''}{refused}{twice}{left}"
    )


def failure_reasons(failed: Mapping[str, int], of: int | None = None) -> list[dict[str, Any]]:
    """Reasons for rows without a sample, for a page: `name`, `rows`, `share` of `of` (by default of the most frequent
    reason), `help`, and `kind`: refused, passing or bad."""
    whole = of or max(failed.values(), default=0)
    return [
        {"name": name, "rows": rows, "share": rows / whole, "help": _help(name), "kind": _kind(name)}
        for name, rows in sorted(failed.items(), key=lambda item: -item[1])
        if rows
    ]


def _help(reason: str) -> str:
    if reason in REASONS:
        return REASONS[reason].help
    return f"the server answered {reason.removeprefix('http_')}" if reason.startswith("http_") else ""


def _kind(reason: str) -> str:
    if reason in REASONS and REASONS[reason].refused:
        return "refused"
    return "passing" if is_transient(reason) else "bad"


class ShardCounts:
    """Counts sealed shards: those from before this call, and those that it has added."""

    def __init__(self, records: tuple[ShardRecord, ...]):
        self.urls = self.samples = self.shards = self.fetched = 0
        self.failed: Counter[str] = Counter()
        for record in records:
            self._count(record)
        self._fetched_before, self._samples_before = self.fetched, self.samples
        self._started_s = time.monotonic()

    def add(self, record: ShardRecord) -> None:
        """Add a shard that was just sealed."""
        self._count(record)

    def correct(self, record: ShardRecord, by: ShardRecord) -> None:
        """Replace the counts of a shard from which samples were removed."""
        self.samples += by.samples - record.samples
        self.failed.update(by.failed)
        self.failed.subtract(record.failed)

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def images_per_s(self) -> float:
        """Rate of this call."""
        return round((self.samples - self._samples_before) / max(self.wall_s, 1e-9), 2)

    @property
    def rows_per_s(self) -> float:
        """Rate of this call; a row that is fetched again counts again."""
        return (self.fetched - self._fetched_before) / max(self.wall_s, 1e-9)

    def reasons(self) -> dict[str, int]:
        """Rows without a sample, by the reason of their last failure, most frequent first."""
        return {reason: rows for reason, rows in self.failed.most_common() if rows}

    def summary(self) -> dict:
        """Counts of the sealed shards, rate and time of this call."""
        return {
            "urls": self.urls,
            "succeeded": self.samples,
            "failed": self.reasons(),
            "shards": self.shards,
            "images_per_s": self.images_per_s,
            "wall_s": round(self.wall_s, 3),
        }

    def _count(self, record: ShardRecord) -> None:
        self.shards += 1
        self.samples += record.samples
        self.fetched += record.urls
        self.urls += record.urls - sum(record.retried.values())
        self.failed.update(record.failed)
        self.failed.subtract(record.retried)
