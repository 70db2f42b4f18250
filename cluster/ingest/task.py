"""What runs in an ingest worker: fetch -> verify -> publish of one part, or a mere try whether some rows kill it."""

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
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.ingest.metrics import observe
from ingest.folder.lease import Ticket
from ingest.lists.sources import Part
from roclip.config import IngestConfig, environment_defaults
from roclip.data.shards import SHARD_DIGITS, ShardRecord

WORK = "_work"
"""Folder of unfinished shards beside the sealed ones; `<shard>-<machine>-pid<process>-<random>` in it is one task's.
Those of a store lie in the node's folder for temporary files instead."""
OUTAGE_URLS = 100
"""A shard of so many URLs of the list or more, of which none arrived, is an outage, not a shard: it is not sealed."""
TOP_HOSTS = 20
"""Of those that failed, in what a task tells."""
LEFT_OUT = "kills_worker: the process that handled this row died each time"


@dataclass(frozen=True)
class Order:
    """One part to be made a shard, with all that a worker must know."""

    part: Part
    root: Path
    config: IngestConfig
    ticket: Ticket
    rows_sha256: str
    max_bad_frac: float = 1.0
    outage_urls: int = OUTAGE_URLS
    retried: dict[str, int] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()
    """Positions of rows that are not fetched, because they kill the worker."""
    held: bool = False
    """The shard is kept from training for now."""
    desks: tuple[str, ...] = ()
    """Names of those that give turns at hosts to all tasks (`cluster/ingest/rate_limiter.py`)."""
    run: str = ""
    """In the metrics."""

    @property
    def name(self) -> str:
        return f"{self.part.number:0{SHARD_DIGITS}d}.tar"

    def only(self, rows: range) -> "Order":
        """The same for some of its rows."""
        return replace(self, part=Part(self.part.number, copied(self.part.table.slice(rows.start, len(rows)))))


@dataclass(frozen=True)
class TaskResult:
    """What a task says of its shard. Without a record, the shard was not sealed."""

    record: ShardRecord | None
    samples: int
    failed: dict[str, int]
    bad_frac: float
    bad_hosts: dict[str, int] = field(default_factory=dict)
    """Hosts with the most rows that failed."""
    free_memory_frac: float = 1.0
    """Of the node, when the task ended."""


def seal_part(order: Order) -> TaskResult:
    """The task. Its folder is gone when it ends, unless the process is killed."""
    environment_defaults()
    from ingest.shard.fetch import fetch
    from ingest.shard.publish import Seal, publish
    from ingest.shard.verify import verify

    with _folder(order) as work:
        begun_s = time.monotonic()
        hosts, robots = manners(order.config, order.desks)
        fetched = fetch(order.part, Path(work), order.config, hosts, robots, dict.fromkeys(order.left_out, LEFT_OUT))
        begun_s = observe(order.run, "fetch", begun_s)
        report = verify(fetched.tar, fetched.parquet, urls=fetched.urls)
        begun_s = observe(order.run, "verify", begun_s)
        arrived = report.samples > 0 or report.bad_frac > 0
        good = report.bad_frac <= order.max_bad_frac and (arrived or report.urls < order.outage_urls)
        bad_hosts = _bad_hosts(fetched.parquet)
        seal = Seal(order.rows_sha256, order.retried, order.held, order.ticket)
        record = publish(order.root, fetched, report, seal) if good else None
        observe(order.run, "publish", begun_s)
    memory = psutil.virtual_memory()
    return TaskResult(
        record, report.samples, report.failed, report.bad_frac, bad_hosts, memory.available / max(1, memory.total)
    )


def probe(order: Order) -> None:
    """Fetch and verify, and throw away what came: only whether this process outlives it counts."""
    environment_defaults()
    from ingest.shard.fetch import fetch
    from ingest.shard.verify import verify

    with _folder(order) as work:
        fetched = fetch(order.part, Path(work), order.config, *manners(order.config, order.desks))
        verify(fetched.tar, fetched.parquet, urls=fetched.urls)


@functools.lru_cache(maxsize=1)
def manners(config: IngestConfig, desks: tuple[str, ...]) -> tuple[Any, Any]:
    """This process's turns at hosts, and what it knows of robots.txt: kept from one shard to the next."""
    from cluster.ingest.rate_limiter import SharedRateLimiter
    from ingest.http.connection import Opener
    from ingest.http.policy import AGENT
    from ingest.http.rate_limiter import RateLimiter
    from ingest.http.robots import Robots

    hosts = SharedRateLimiter(config.policy, desks) if desks else RateLimiter(config.policy)
    opener = Opener(config.policy, timeout_s=config.timeout_s, hosts=hosts)
    return hosts, Robots(opener.fetch_robots, AGENT)


def copied(table: pa.Table) -> pa.Table:
    """The same rows in memory of their own: pickled as it is, a slice would take the whole list along."""
    return table.take(pa.array(range(len(table)), pa.int64()))


def work_folder(root: Path) -> Path:
    """Where the tasks of a node work."""
    if isinstance(root, Path):
        return root / WORK
    number = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"roclip-ingest-{os.getuid()}" / number


def _folder(order: Order) -> tempfile.TemporaryDirectory:
    folder = work_folder(order.root)
    folder.mkdir(parents=True, exist_ok=True)  # of a node of its own, where the shards go to a store
    here = f"-{os.uname().nodename}-pid"
    _sweep(folder, here)
    prefix = f"{order.part.number:0{SHARD_DIGITS}d}{here}{os.getpid()}-"
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)


def _sweep(folder: Path, here: str) -> None:
    """Take away what tasks left on this machine that were killed."""
    for left in folder.glob(f"*{here}*"):
        process = left.name.rpartition(here)[2].partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _bad_hosts(parquet: Path) -> dict[str, int]:
    table = pq.read_table(parquet, columns=["url", "status"])
    rows = zip(table.column("url").to_pylist(), table.column("status").to_pylist(), strict=True)
    return dict(Counter(_host(url) for url, status in rows if status != "success").most_common(TOP_HOSTS))


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:
        return ""
