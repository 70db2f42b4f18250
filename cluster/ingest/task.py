"""The Ray task of one part: fetch -> verify -> publish, or a probe of whether some rows kill the worker."""

import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ingest.metrics import observe
from ingest.folder.lease import FencingToken
from ingest.http.urls import host_of
from ingest.lists.sources import Part
from roclip.config import IngestConfig, environment_defaults
from roclip.data.shards import SHARD_DIGITS, ShardRecord

WORK = "_work"
"""Folder of unfinished shards beside the sealed ones; `<shard>-<machine>-pid<process>-<random>` in it belongs to one task. If
the shards are on a store, it is in the node's folder for temporary files instead.
"""
OUTAGE_URLS = 100
"""A part of at least this many URLs, none of which arrived, is an outage: it is not sealed."""
TOP_HOSTS = 20
"""Number of failing hosts in a task's result."""
KILLS_WORKER = "kills_worker: the process that handled this row died each time"


@dataclass(frozen=True)
class PartSpec:
    """One part to be made into a shard, with everything that a worker needs."""

    part: Part
    root: Path
    config: IngestConfig
    token: FencingToken
    rows_sha256: str
    max_bad_frac: float = 1.0
    outage_urls: int = OUTAGE_URLS
    retried: dict[str, int] = field(default_factory=dict)
    excluded: tuple[int, ...] = ()
    """Positions of rows that are not fetched, because they kill the worker."""
    held: bool = False
    """The shard is withheld from training for now."""
    limiters: tuple[str, ...] = ()
    """Names of the actors that limit requests per host for all tasks (`cluster/ingest/rate_limiter.py`)."""
    run: str = ""
    """Name of the run in the metrics."""

    @property
    def name(self) -> str:
        return f"{self.part.number:0{SHARD_DIGITS}d}.tar"

    def only(self, rows: range) -> "PartSpec":
        """The same for some of its rows."""
        return replace(self, part=Part(self.part.number, detached_copy(self.part.table.slice(rows.start, len(rows)))))


@dataclass(frozen=True)
class TaskResult:
    """The result of a task. Without a record, the shard was not sealed."""

    record: ShardRecord | None
    samples: int
    failed: dict[str, int]
    bad_frac: float
    bad_hosts: dict[str, int] = field(default_factory=dict)
    """Hosts with the most failed rows."""
    free_memory_frac: float = 1.0
    """Fraction of the node's memory that was free when the task ended."""


def seal_part(spec: PartSpec) -> TaskResult:
    """The task: fetch, verify and publish one part. Its folder is deleted at the end, unless the process is killed."""
    environment_defaults()
    from ingest.shard.fetch import fetch
    from ingest.shard.publish import Seal, publish
    from ingest.shard.verify import verify

    with _folder(spec) as work:
        start_s = time.monotonic()
        limiter, robots = site_rules(spec.config, spec.limiters)
        fetched = fetch(spec.part, Path(work), spec.config, limiter, robots, dict.fromkeys(spec.excluded, KILLS_WORKER))
        start_s = observe(spec.run, "fetch", start_s)
        report = verify(fetched.tar, fetched.parquet, urls=fetched.urls)
        start_s = observe(spec.run, "verify", start_s)
        arrived = report.samples > 0 or report.bad_frac > 0
        good = report.bad_frac <= spec.max_bad_frac and (arrived or report.urls < spec.outage_urls)
        bad_hosts = _bad_hosts(fetched.parquet)
        seal = Seal(spec.rows_sha256, spec.retried, spec.held, spec.token)
        record = publish(spec.root, fetched, report, seal) if good else None
        observe(spec.run, "publish", start_s)
    memory = psutil.virtual_memory()
    return TaskResult(
        record, report.samples, report.failed, report.bad_frac, bad_hosts, memory.available / max(1, memory.total)
    )


def probe(spec: PartSpec) -> None:
    """Fetch and verify, and discard the result: only whether this process survives counts."""
    environment_defaults()
    from ingest.shard.fetch import fetch
    from ingest.shard.verify import verify

    with _folder(spec) as work:
        fetched = fetch(spec.part, Path(work), spec.config, *site_rules(spec.config, spec.limiters))
        verify(fetched.tar, fetched.parquet, urls=fetched.urls)


@functools.lru_cache(maxsize=1)
def site_rules(config: IngestConfig, limiters: tuple[str, ...]) -> tuple[Any, Any]:
    """This process's rate limiter and robots.txt cache, kept from one shard to the next."""
    from cluster.ingest.rate_limiter import SharedRateLimiter
    from ingest.http.connection import Opener
    from ingest.http.policy import AGENT
    from ingest.http.rate_limiter import RateLimiter
    from ingest.http.robots import Robots

    limiter = SharedRateLimiter(config.policy, limiters) if limiters else RateLimiter(config.policy)
    opener = Opener(config.policy, timeout_s=config.timeout_s, limiter=limiter)
    return limiter, Robots(opener.fetch_robots, AGENT)


def detached_copy(table: pa.Table) -> pa.Table:
    """A copy of the rows: pickled as it is, a slice would take the whole batch along."""
    return table.take(pa.array(range(len(table)), pa.int64()))


def work_folder(root: Path) -> Path:
    """Where the tasks of a node put unfinished shards."""
    if isinstance(root, Path):
        return root / WORK
    number = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"roclip-ingest-{os.getuid()}" / number


def _folder(spec: PartSpec) -> tempfile.TemporaryDirectory:
    folder = work_folder(spec.root)
    folder.mkdir(parents=True, exist_ok=True)  # not shared with other nodes if the shards are on a store
    machine_mark = f"-{os.uname().nodename}-pid"
    _remove_stale_folders(folder, machine_mark)
    prefix = f"{spec.part.number:0{SHARD_DIGITS}d}{machine_mark}{os.getpid()}-"
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)


def _remove_stale_folders(folder: Path, machine_mark: str) -> None:
    """Delete the folders of tasks on this machine that were killed."""
    for leftover in folder.glob(f"*{machine_mark}*"):
        process = leftover.name.rpartition(machine_mark)[2].partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _bad_hosts(parquet: Path) -> dict[str, int]:
    table = pq.read_table(parquet, columns=["url", "status"])
    rows = zip(table.column("url").to_pylist(), table.column("status").to_pylist(), strict=True)
    return dict(Counter(host_of(url) for url, status in rows if status != "success").most_common(TOP_HOSTS))
