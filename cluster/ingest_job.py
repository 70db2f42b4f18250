"""Ingest on Ray: one task a shard, few in flight, tried again when it fails. The manifest is the only memory.

A task is fetch -> verify -> publish. What is sealed when this process dies stays sealed; calling `ingest`
again does the rest. Shards never pass through Ray's object store: tasks write to the folder, which all nodes
must see, or put them on a store.
"""

import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from ingest.sources import Part, read_url_list, split
from roclip.config import Config, IngestConfig, environment_defaults
from roclip.errors import DataError, StageError
from roclip.shards import SHARD_DIGITS, Manifest, ShardRecord

WORK = "_work"
"""Folder of unfinished shards beside the sealed ones; `<shard>-pid<process>-<random>` in it is one task's. Those of a
store lie in the node's folder for temporary files instead."""
OUTAGE_URLS = 100
"""A shard of so many URLs or more of which none arrived is an outage, not a shard: it is not sealed."""
_POLL_S = 0.25


@dataclass(frozen=True)
class IngestProgress:
    """Where an ingest stands. Counts are of sealed shards, rates of what this call has sealed."""

    done_urls: int
    total_urls: int
    succeeded: int
    """Usable samples."""
    failed: dict[str, int]
    """Other rows, by reason."""
    shards: int
    total_shards: int
    images_per_s: float
    eta_s: float | None
    """Seconds left at this rate; None as long as there is none."""


@dataclass(frozen=True)
class _Outcome:
    """What a task says of its shard. Without a record, the shard was not sealed."""

    record: ShardRecord | None
    samples: int
    failed: dict[str, int]
    bad_frac: float


def ingest(
    config: Config,
    urls: str | Path,
    shards: Path,
    *,
    on_progress: Callable[[IngestProgress], None] | None = None,
    stop: threading.Event | None = None,
) -> dict:
    """Turn a URL list into sealed shards under `shards`, and return the summary that the manifest ends with.

    Needs a Ray that is initialised. `shards` is a folder that all nodes see, or a place on a store. The list's columns
    and limit are those of `config.data` where that names a URL list; a list that the embedded origin wrote has the
    columns `url` and `caption` and is taken whole.

    Returns `{"urls", "succeeded", "failed": {reason: rows}, "shards", "images_per_s", "wall_s"}`: counts over
    all sealed shards, rate and time of this call. When `stop` is set, tasks are cancelled and the summary of
    what is sealed by then is returned; the manifest is not ended.

    Raises `DataError` for a shard in which more than `data.max_bad_frac` of what arrived is of no use, or
    when `shards` holds the shards of another list; `StageError` when a shard fails more than
    `ingest.shard_retries` times. What is sealed stays sealed.
    """
    if isinstance(shards, Path):
        shards = shards.resolve()  # a worker may stand in another folder
    source = config.data if config.data.urls else None
    table = read_url_list(
        str(urls),
        url_col=source.url_col if source else "url",
        caption_col=source.caption_col if source else "caption",
        limit=source.limit if source else 0,
    )
    parts = split(table, config.ingest.samples_per_shard)
    job = _Job(config, shards, parts)
    if not job.todo and job.manifest.summary is not None:
        _tell(on_progress, job)
        return job.manifest.summary
    job.manifest.reopen()
    work = _work_folder(shards)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        while job.todo or job.in_flight:
            if stop is not None and stop.is_set():
                return job.summary()
            job.step()
            _tell(on_progress, job)
    finally:
        job.cancel()
        shutil.rmtree(work, ignore_errors=True)
    summary = job.summary()
    job.manifest.finish(summary)
    _tell(on_progress, job)
    return summary


def describe(now: IngestProgress) -> str:
    """Counts, rate, success and the most frequent failures, in a line."""
    rate = now.succeeded / now.done_urls if now.done_urls else 0.0
    reasons = ", ".join(f"{name} {rows}" for name, rows in Counter(now.failed).most_common(3))
    left = f"  {now.eta_s:.0f} s left" if now.eta_s and now.done_urls < now.total_urls else ""
    return (
        f"{now.done_urls}/{now.total_urls} URLs  {now.shards}/{now.total_shards} shards  "
        f"{now.images_per_s:.0f} images/s  {rate:.1%} usable{f' ({reasons})' if reasons else ''}{left}"
    )


def _tell(on_progress: Callable[[IngestProgress], None] | None, job: "_Job") -> None:
    if on_progress is not None:
        on_progress(job.progress())


class _Job:
    """The shards of one call: to do, in flight, sealed."""

    def __init__(self, config: Config, root: Path, parts: list[Part]):
        self.config, self.root = config, root
        self.manifest = Manifest(root)
        self.urls = sum(len(part.table) for part in parts)
        self.shards = len(parts)
        self.sealed = self._find_sealed(parts)
        self.found = sum(record.urls for record in self.sealed.values())
        self.found_samples = sum(record.samples for record in self.sealed.values())
        self.todo = deque((part, 1) for part in parts if _name(part) not in self.sealed)
        self.in_flight: dict[Any, tuple[Part, int]] = {}
        self.started_s = time.monotonic()

    def step(self) -> None:
        """Fill the window, wait a moment, take in what is done."""
        while self.todo and len(self.in_flight) < self.config.ingest.max_in_flight:
            part, attempt = self.todo.popleft()
            self.in_flight[self._submit(part)] = part, attempt
        ready, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=_POLL_S)
        for task in ready:
            part, attempt = self.in_flight.pop(task)
            try:
                outcome = ray.get(task)
            except RayError as error:
                self._again(part, attempt, _cause(error))
                continue
            self._take_in(part, attempt, outcome)

    def cancel(self) -> None:
        """End the tasks that are still in flight; returns when they have ended."""
        tasks = list(self.in_flight)
        self.in_flight.clear()
        if not tasks or not ray.is_initialized():
            return
        for task in tasks:
            ray.cancel(task, force=True)
        ray.wait(tasks, num_returns=len(tasks), timeout=30)

    def progress(self) -> IngestProgress:
        summary = self.summary()
        done = sum(record.urls for record in self.sealed.values())
        urls_per_s = (done - self.found) / max(summary["wall_s"], 1e-9)
        return IngestProgress(
            done_urls=done,
            total_urls=self.urls,
            succeeded=summary["succeeded"],
            failed=summary["failed"],
            shards=len(self.sealed),
            total_shards=self.shards,
            images_per_s=summary["images_per_s"],
            eta_s=(self.urls - done) / urls_per_s if urls_per_s else None,
        )

    def summary(self) -> dict:
        """Counts of the sealed shards, rate and time of this call."""
        records = self.sealed.values()
        failed: Counter[str] = Counter()
        for record in records:
            failed.update(record.failed)
        samples = sum(record.samples for record in records)
        wall_s = time.monotonic() - self.started_s
        return {
            "urls": sum(record.urls for record in records),
            "succeeded": samples,
            "failed": dict(failed.most_common()),
            "shards": len(records),
            "images_per_s": round((samples - self.found_samples) / max(wall_s, 1e-9), 2),
            "wall_s": round(wall_s, 3),
        }

    def _find_sealed(self, parts: list[Part]) -> dict[str, ShardRecord]:
        rows = {_name(part): len(part.table) for part in parts}
        sealed = {record.name: record for record in self.manifest.records()}
        for name, record in sealed.items():
            if rows.get(name) != record.urls:
                raise DataError(
                    f"{self.root}: expected the shards of this URL list, but {name} was sealed for "
                    f"{record.urls} URLs and the list has {rows.get(name, 0)} there. Use another folder for "
                    "another list or another ingest.samples_per_shard."
                )
        return sealed

    def _submit(self, part: Part) -> Any:
        rows = part.table.take(pa.array(range(len(part.table))))  # pickled as it is, a slice would take the list along
        options = {
            "name": f"ingest-shard-{part.number:0{SHARD_DIGITS}d}",
            "num_cpus": self.config.cluster.cpus_per_ingest_task,
            "max_retries": 0,  # `_again` does it, and counts crashes and errors alike
            "scheduling_strategy": "SPREAD",
            # Workers of their own: in them webdataset found no torch, which nobody else should inherit.
            "runtime_env": {"env_vars": {"ROCLIP_ROOM": "ingest"}},
        }
        task = ray.remote(_ingest_shard).options(**options)
        return task.remote(Part(part.number, rows), self.root, self.config.ingest, self.config.data.max_bad_frac)

    def _take_in(self, part: Part, attempt: int, outcome: _Outcome) -> None:
        if outcome.record is not None:
            self.sealed[outcome.record.name] = outcome.record
            self.manifest.pack()
        elif outcome.samples or outcome.bad_frac:
            limit = self.config.data.max_bad_frac
            raise DataError(
                f"shard {_name(part)}: expected at most {limit:.1%} of what arrived to be of no use, got "
                f"{outcome.bad_frac:.1%}; of {len(part.table)} URLs: {_counts(outcome.failed)}. "
                "Look at these URLs, or raise data.max_bad_frac."
            )
        else:
            self._again(part, attempt, f"none of {len(part.table)} URLs arrived: {_counts(outcome.failed)}")

    def _again(self, part: Part, attempt: int, cause: str) -> None:
        _sweep(_work_folder(self.root), part)
        if attempt > self.config.ingest.shard_retries:
            raise StageError(
                f"shard {_name(part)} failed {attempt} times, last: {cause}. "
                "What is sealed stays: run ingest again when the cause is gone."
            )
        self.todo.appendleft((part, attempt + 1))


def _ingest_shard(part: Part, root: Path, config: IngestConfig, max_bad_frac: float) -> _Outcome:
    """The task: runs in a Ray worker. Its folder is gone when it ends, unless the process is killed."""
    environment_defaults()
    from ingest.fetch import fetch
    from ingest.publish import publish
    from ingest.verify import verify

    folder = _work_folder(root)
    folder.mkdir(parents=True, exist_ok=True)  # of a node of its own, where the shards go to a store
    _sweep(folder, part)
    prefix = f"{part.number:0{SHARD_DIGITS}d}-pid{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as work:
        fetched = fetch(part, Path(work), config)
        report = verify(fetched.tar, fetched.parquet, urls=fetched.urls)
        arrived = report.samples > 0 or report.bad_frac > 0
        good = report.bad_frac <= max_bad_frac and (arrived or report.urls < OUTAGE_URLS)
        record = publish(root, fetched, report) if good else None
    return _Outcome(record, report.samples, report.failed, report.bad_frac)


def _work_folder(root: Path) -> Path:
    """Where the tasks of a node work."""
    if isinstance(root, Path):
        return root / WORK
    number = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"roclip-ingest-{os.getuid()}" / number


def _sweep(folder: Path, part: Part) -> None:
    """Take away what earlier attempts at a shard left on this node."""
    for left in folder.glob(f"{part.number:0{SHARD_DIGITS}d}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _name(part: Part) -> str:
    return f"{part.number:0{SHARD_DIGITS}d}.tar"


def _counts(failed: dict[str, int]) -> str:
    return ", ".join(f"{reason} {rows}" for reason, rows in Counter(failed).most_common())


def _cause(error: RayError) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"
