"""The Prometheus metrics of an ingest.

The driver counts each sealed shard once, and outlives the tasks; tasks report how long their phases took, and on which node.
"""

import time
from collections import Counter
from collections.abc import Mapping

from cluster.monitoring.publisher import count
from roclip.data.outcomes import REASONS
from roclip.data.shards import ShardRecord

OTHER_HOSTS = "other"
MAX_HOSTS = 50
"""Hosts with a series of their own; the others are counted together."""


def observe(run: str, phase: str, start_s: float) -> float:
    """Add the time since `start_s`, of the monotonic clock, to a phase. Returns the time now."""
    now_s = time.monotonic()
    count("roclip_ingest_phase_seconds", now_s - start_s, run=run, phase=phase)
    return now_s


def count_sealed(run: str, record: ShardRecord) -> None:
    """Count a shard that was just sealed."""
    count("roclip_ingest_shards", run=run)
    count("roclip_ingest_images", record.samples, run=run)
    count("roclip_ingest_urls", record.urls, run=run)
    count("roclip_ingest_bytes", record.bytes, run=run)
    for reason, rows in record.failed.items():
        count("roclip_ingest_failed", rows, run=run, reason=reason)
        if reason in REASONS and REASONS[reason].refused:
            count("roclip_ingest_refused", rows, run=run, rule=reason)


class HostErrors:
    """Counts failed rows by host, with a bounded number of series: the first hosts to fail get one of their own."""

    def __init__(self, run: str, max_hosts: int = MAX_HOSTS):
        self.run, self.max_hosts = run, max_hosts
        self.rows: Counter[str] = Counter()

    def add(self, bad_hosts: Mapping[str, int]) -> None:
        for host, rows in sorted(bad_hosts.items(), key=lambda item: (-item[1], item[0])):
            has_own_series = host in self.rows or len(self.rows) < self.max_hosts
            self.rows[host if has_own_series else OTHER_HOSTS] += rows
            count("roclip_ingest_host_errors", rows, run=self.run, host=host if has_own_series else OTHER_HOSTS)
