"""What an operator's Prometheus sees of an ingest, through Ray's own endpoint on each node (`ray_` before each name).

The driver counts what is sealed, once each, and outlives the tasks; a task tells how long its phases took, on which node.
Where Ray has no metrics agent, nothing is sent and nothing fails.
"""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ingest.reasons import REASONS
from roclip.shards import ShardRecord

OTHER_HOSTS = "other"


@dataclass(frozen=True)
class Metric:
    """One series, or one for each value of its tags."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    unit: str
    tags: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("roclip_ingest_images", "counter", "Images that are in sealed shards", "images"),
        Metric(
            "roclip_ingest_urls", "counter", "Rows of the list that sealed shards stand for, once for each pass", "rows"
        ),
        Metric("roclip_ingest_failed", "counter", "Rows that gave no sample, each time", "rows", ("reason",)),
        Metric("roclip_ingest_refused", "counter", "Those of them that a rule refused", "rows", ("rule",)),
        Metric("roclip_ingest_bytes", "counter", "Size of the sealed tars", "bytes"),
        Metric(
            "roclip_ingest_duplicates", "counter", "Samples that are the same as an earlier one", "samples", ("by",)
        ),
        Metric("roclip_ingest_shards", "counter", "Shards that were sealed", "shards"),
        Metric("roclip_ingest_task_failures", "counter", "Tasks that ended without a shard", "tasks", ("how",)),
        Metric(
            "roclip_ingest_host_errors", "counter", "Rows that failed, of the hosts with the most", "rows", ("host",)
        ),
        Metric("roclip_ingest_backlog", "gauge", "Rows that are left, as far as that is known", "rows"),
        Metric("roclip_ingest_images_per_s", "gauge", "Images since this call began, a second", "images/s"),
        Metric("roclip_ingest_in_flight", "gauge", "Tasks that run or wait for a node", "tasks"),
        Metric("roclip_ingest_window", "gauge", "Tasks that may be in flight now", "tasks"),
        Metric("roclip_ingest_phase_s", "counter", "Time in a phase of the tasks", "seconds", ("phase",)),
    )
}
MAX_HOSTS = 50
"""Hosts with a series of their own; the others are counted together."""


def count(name: str, value: float = 1, **tags: str) -> None:
    """Add to a counter of `METRICS`, or set a gauge of it."""
    if METRICS[name].kind == "counter" and not value:
        return
    with contextlib.suppress(Exception):  # measuring never ends an ingest
        metric = _made(name)
        metric.inc(value, tags) if METRICS[name].kind == "counter" else metric.set(value, tags)


def observe(phase: str, begun_s: float) -> float:
    """Count the time since `begun_s`, on the monotonic clock, to a phase; gives the time now."""
    now_s = time.monotonic()
    count("roclip_ingest_phase_s", now_s - begun_s, phase=phase)
    return now_s


@functools.cache
def _made(name: str) -> Any:
    from ray.util import metrics

    known = METRICS[name]
    kind = {"counter": metrics.Counter, "gauge": metrics.Gauge}[known.kind]
    return kind(name, description=f"{known.help} [{known.unit}]", tag_keys=known.tags)


def count_sealed(record: ShardRecord) -> None:
    """Count a shard that was just sealed."""
    count("roclip_ingest_shards")
    count("roclip_ingest_images", record.samples)
    count("roclip_ingest_urls", record.urls)
    count("roclip_ingest_bytes", record.bytes)
    for reason, rows in record.failed.items():
        count("roclip_ingest_failed", rows, reason=reason)
        if reason in REASONS and REASONS[reason].refused:
            count("roclip_ingest_refused", rows, rule=reason)


class HostErrors:
    """Counts failed rows by host, with a bounded number of series: the first hosts to stand out get one of their own."""

    def __init__(self, most: int = MAX_HOSTS):
        self.most = most
        self.rows: Counter[str] = Counter()

    def add(self, bad_hosts: Mapping[str, int]) -> None:
        for host, rows in sorted(bad_hosts.items(), key=lambda item: (-item[1], item[0])):
            own = host in self.rows or len(self.rows) < self.most
            self.rows[host if own else OTHER_HOSTS] += rows
            count("roclip_ingest_host_errors", rows, host=host if own else OTHER_HOSTS)
