"""Ingest on Ray: a list of URLs becomes sealed shards. This file is the order of the steps; read it first.

    lease      one ingest at a time fills a folder                                    ingest/folder/lease.py
    list       its parts are streamed, and those without a sealed shard are fetched   ledger.py, cluster/ingest/tasks.py
    passes     transient failures are retried, into new shards                        ingest/folder/retries.py
    more       rows that were appended to the list since it was read are its next parts
    release    shards that `ingest.quarantine` held back are published
    end        the manifest records that no more will come

Sealed shards survive this process; calling `ingest` again does the rest. Shards never pass through Ray's object store: tasks
write to the folder, which all nodes must see, or to a store.
"""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from cluster.ingest.rate_limiter import host_rate_limiters, limiters_needed
from cluster.ingest.task import OUTAGE_URLS, PartSpec, detached_copy, work_folder
from cluster.ingest.tasks import Stopped, Tasks
from cluster.monitoring.publisher import count
from ingest.folder.lease import Lease
from ingest.folder.ledger import Ledger, Segment
from ingest.folder.retries import retry_parts, retry_rows, transient_reasons
from ingest.lists.same_list import check_same, rows_sha256
from ingest.lists.sources import Part, UrlList, open_configured_list
from roclip.config import Config
from roclip.data.shards import HELD, Manifest, ShardRecord
from roclip.errors import ConfigError, DataError
from roclip.report.ingest_progress import IngestProgress, ShardCounts
from roclip.storage import drop, names_in

Release = Callable[[Path, tuple[ShardRecord, ...]], Iterable[ShardRecord]]
"""(shards, held records) -> the records to publish in their place. It may write smaller indexes, each atomically; after an
interruption it is called again for the same records.
"""


def ingest(
    config: Config,
    urls: str | Path,
    shards: Path,
    *,
    on_progress: Callable[[IngestProgress], None] | None = None,
    stop: threading.Event | None = None,
    release: Release | None = None,
    run: str = "",
) -> dict:
    """Turn a URL list into sealed shards under `shards`, and return the summary that the manifest ends with.

    Ray must be initialised. The list's columns and limit are those of `config.data` if it names a URL list; a list written by
    the embedded origin has the columns `url` and `caption` and is read completely. If a list begins with what was ingested
    before, only the rest becomes new shards; a finished ingest of an unchanged list does nothing.

    Args:
        config: The run's config.
        urls: The URL list.
        shards: A folder that all nodes see, or a place on a store.
        on_progress: Called with the progress several times a second.
        stop: When set, tasks are cancelled and the summary of the sealed shards is returned; the manifest is not ended.
        release: Publishes held shards; needed with `ingest.quarantine`.
        run: Names the tasks and the metrics; by default the list's name.

    Returns `{"urls", "succeeded", "failed": {reason: rows}, "shards", "images_per_s", "wall_s"}`: counts over all sealed
    shards, rate and time of this call. A retried row counts once, with its last outcome.

    Raises `DataError` for a shard in which more than `data.max_bad_frac` of what arrived is unusable, or if `shards` holds the
    shards of another list; `StageError` if a shard fails more than `ingest.shard_retries` times; `RunLockedError` if another
    ingest fills `shards`. Sealed shards stay sealed.
    """
    if config.ingest.quarantine and release is None:
        raise ConfigError("ingest.quarantine: expected a `release` for held shards, got none. Set it to [].")
    if isinstance(shards, Path):
        shards = shards.resolve()  # workers may have another working directory
    source = open_configured_list(config, urls)
    if (summary := finished_summary(config, source, shards)) is not None:
        return summary
    with Lease(shards) as lease:
        return _Ingest(config, source, shards, lease, on_progress, stop or threading.Event(), release, run).run()


def finished_summary(config: Config, source: UrlList, shards: Path) -> dict | None:
    """The summary of an ingest that is finished, or None if there is something to do."""
    summary, ledger = Manifest(shards).summary, Ledger(shards)
    if summary is None or not ledger.segments or any(segment.digest != source.digest for segment in ledger.lists):
        return None
    passes_left = ledger.segments[-1].pass_number < config.ingest.retry_passes and summary.get("passing", 1)
    return None if passes_left else summary


class _Ingest:
    """One call of `ingest`, under the lease."""

    def __init__(
        self,
        config: Config,
        source: UrlList,
        root: Path,
        lease: Lease,
        on_progress: Callable[[IngestProgress], None] | None,
        stop: threading.Event,
        release: Release | None,
        run: str,
    ):
        self.run_name = run or source.name
        self.config, self.source, self.root, self.lease = config, source, root, lease
        self.on_progress, self.stop, self.release = on_progress, stop, release
        self.per_shard = config.ingest.samples_per_shard
        self.manifest, self.held = Manifest(root), Manifest(root, HELD)
        published = self.manifest.records()
        self.published = len(published)
        self.sealed = {shard_number(record): record for record in (*self.held.records(), *published)}
        self.tally = ShardCounts(tuple(self.sealed.values()))
        self.ledger = Ledger(root, lease.token.check)
        self.segment: Segment | None = None
        self.limiters: tuple[str, ...] = ()
        self.retried_rows = self.rows_read = 0
        # The URLs of a list written by the embedded origin change with its port.
        self.identity = ("url", "caption") if config.data.urls else ("caption",)
        self.tasks = Tasks(config, self.run_name, lease, self.stop, on_sealed=self._seal, on_step=self._report_progress)

    def run(self) -> dict:
        """Run all steps, from the state that the folder is in."""
        self._check_list()
        self.manifest.reopen()
        work = work_folder(self.root)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            for segment in self._segments():
                self.segment = segment
                self.retried_rows = sum(self.sealed[number].urls for number in segment.numbers(self.sealed))
                # New rate limiters per segment: hosts that were down while the list was read are tried again in a later pass.
                with host_rate_limiters(self.config.ingest.policy, self.run_name, limiters_needed()) as self.limiters:
                    self.tasks.run(self._specs(segment))
            self._publish_held()
        except Stopped:
            return self.tally.summary()
        finally:
            self.tasks.cancel()
            shutil.rmtree(work, ignore_errors=True)
        summary = {**self.tally.summary(), "passing": self._transient_rows_left()}
        self.lease.token.check()
        self.manifest.finish(summary)
        self._report_progress()
        return summary

    def _check_list(self) -> None:
        """Raise `DataError` if the sealed shards are not of this list."""
        if not self.ledger.segments:
            fresh = Segment(
                0, self.per_shard, list_name=self.source.name, digest="" if self.sealed else self.source.digest
            )
            self.ledger.add(fresh)
        if (previous := self.ledger.segments[0].samples_per_shard) != self.per_shard:
            raise DataError(
                f"{self.root}: expected ingest.samples_per_shard={previous}, with which this ingest began, got "
                f"{self.per_shard}. Use another folder for another number."
            )
        for segment in self.ledger.lists:
            numbers = segment.numbers(self.sealed)
            if segment.rows is None and numbers and (urls := self.sealed[numbers[-1]].urls) < self.per_shard:
                rows = (numbers[-1] - segment.first_shard) * self.per_shard + urls  # only the last part is short
                segment = self.ledger.end(segment, rows)
            if segment.digest != self.source.digest:
                check_same(self.source, segment, self.sealed, self.identity, self.root)
                self.ledger.set_list(segment, self.source.name, self.source.digest)

    def _segments(self) -> Iterator[Segment]:
        """The segments to work on, one after another: each is requested when the one before it is sealed."""
        yield self.ledger.segments[-1]
        while True:
            while (retry := self._next_pass()) is not None:
                yield retry
            if (new_rows := self._new_rows_segment()) is None:
                return
            yield new_rows

    def _next_pass(self) -> Segment | None:
        """Record and return the retry pass after the last segment; None if there is nothing to retry, or no passes are left."""
        last = self.ledger.segments[-1]
        records = [self.sealed[number] for number in last.numbers(self.sealed)]
        reasons = transient_reasons(records)
        rows = sum(retry_rows(record, reasons) for record in records)
        if last.pass_number >= self.config.ingest.retry_passes or not rows:
            return None
        number = last.pass_number + 1
        return self.ledger.add(
            Segment(self.ledger.next_shard, self.per_shard, pass_number=number, reasons=reasons, rows=rows)
        )

    def _new_rows_segment(self) -> Segment | None:
        """Record and return a segment for the rows appended to the list since its last one ended; None if there are none."""
        last = self.ledger.lists[-1]
        start = last.first_row + (last.rows or 0)
        if next(self.source.parts(self.per_shard, start), None) is None:
            return None
        return self.ledger.add(
            Segment(
                self.ledger.next_shard, self.per_shard, start, list_name=self.source.name, digest=self.source.digest
            )
        )

    def _specs(self, segment: Segment) -> Iterator[PartSpec]:
        """The remaining parts of a segment; at its end its length is recorded."""
        if segment.pass_number:
            yield from self._retry_specs(segment)
            return
        done = set(segment.numbers(self.sealed))
        if segment.shards is not None and len(done) == segment.shards:
            return
        first = next(number for number in itertools.count(segment.first_shard) if number not in done)
        start = self.rows_read = segment.first_row + (first - segment.first_shard) * self.per_shard
        for number, part in enumerate(self.source.parts(self.per_shard, start), first):
            rows = segment.rows_of(number)
            if rows is not None and rows <= 0:
                break
            table = part.table.slice(0, rows)
            self.rows_read += len(table)
            if number not in done:
                yield replace(
                    self._spec(number, detached_copy(table), rows_sha256(table, self.identity)),
                    max_bad_frac=self.config.data.max_bad_frac,
                    outage_urls=OUTAGE_URLS,
                )
        rows = self.rows_read - segment.first_row
        if rows != (segment.rows or rows):
            raise DataError(
                f"{self.root}: expected {segment.rows} rows of the list from row {segment.first_row} on, as when it was "
                f"first read, got {rows}. Restore the whole list."
            )
        self.segment = self.ledger.end(segment, rows)

    def _retry_specs(self, segment: Segment) -> Iterator[PartSpec]:
        previous = self.ledger.segments[self.ledger.segments.index(segment) - 1]
        records = [self.sealed[number] for number in previous.numbers(self.sealed)]
        first = segment.first_shard
        for retry in retry_parts(
            self.root, records, segment.reasons, self.per_shard, lambda position: first + position not in self.sealed
        ):
            digest = rows_sha256(retry.table, ("retry_of",))
            yield replace(self._spec(first + retry.position, retry.table, digest), retried=retry.retried)

    def _spec(self, number: int, table: pa.Table, digest: str) -> PartSpec:
        return PartSpec(
            Part(number, table),
            self.root,
            self.config.ingest,
            self.lease.token,
            digest,
            outage_urls=len(table) + 1,
            held=bool(self.config.ingest.quarantine),
            limiters=self.limiters,
            run=self.run_name,
        )

    def _seal(self, record: ShardRecord) -> None:
        """Account for a shard that a task has sealed."""
        self.sealed[shard_number(record)] = record
        self.tally.add(record)
        self.retried_rows += record.urls
        if self.config.ingest.quarantine:
            self.held.pack()
        else:
            self.published += 1
            self.manifest.pack()

    def _publish_held(self) -> None:
        """Publish the held shards as returned by `release`; safe to interrupt anywhere."""
        held = self.held.records()
        if not held:
            return
        assert self.release is not None
        known = {record.name for record in self.manifest.records()}
        for record in self.release(self.root, held):
            self.tally.correct(self.sealed[shard_number(record)], record)
            self.sealed[shard_number(record)] = record
            if record.name not in known:
                self.lease.check()
                self.manifest.publish(record)
                self.published += 1
        self.lease.token.check()
        clear(self.held)

    def _transient_rows_left(self) -> int:
        """Rows that a further pass would retry."""
        last = self.ledger.segments[-1]
        records = [self.sealed[number] for number in last.numbers(self.sealed)]
        return sum(retry_rows(record, transient_reasons(records)) for record in records)

    def _report_progress(self) -> None:
        now = self._progress()
        count(
            "roclip_ingest_backlog_rows",
            (now.total_urls or now.done_urls) - now.done_urls + now.again_total - now.again_done,
            run=self.run_name,
        )
        if self.on_progress is not None:
            self.on_progress(now)

    def _progress(self) -> IngestProgress:
        total, estimated = self._total()
        segment = self.segment
        retry = segment if segment is not None and segment.pass_number else None
        again_total = (retry.rows or 0) if retry else 0
        left = again_total - self.retried_rows if retry else None if total is None else total - self.tally.urls
        shards = None if total is None else max(self.tally.shards, self._shards_of(total))
        return IngestProgress(
            done_urls=self.tally.urls,
            total_urls=total,
            succeeded=self.tally.samples,
            failed=self.tally.reasons(),
            shards=self.tally.shards,
            total_shards=shards,
            images_per_s=self.tally.images_per_s,
            eta_s=left / self.tally.rows_per_s if left is not None and self.tally.rows_per_s else None,
            published=self.published,
            pass_number=retry.pass_number if retry else 0,
            again_done=self.retried_rows if retry else 0,
            again_total=again_total,
            estimated=estimated,
        )

    def _total(self) -> tuple[int | None, bool]:
        """Rows of the list, and whether that is an estimate."""
        if self.source.rows is not None:
            return self.source.rows, False
        if self.ledger.lists and (rows := self.ledger.lists[-1].rows) is not None:
            return self.ledger.lists[-1].first_row + rows, False
        frac = self.source.read_frac
        return (max(self.rows_read, round(self.rows_read / frac)), True) if frac and self.rows_read else (None, True)

    def _shards_of(self, rows: int) -> int:
        """Shards of all segments, if the list has `rows` rows."""
        last = self.ledger.segments[-1] if self.ledger.segments else None
        if last is None:
            return -(-rows // self.per_shard)
        return last.first_shard + (last.shards or -(-(rows - last.first_row) // self.per_shard))


def shard_number(record: ShardRecord) -> int:
    """The number in a shard's name."""
    return int(Path(record.name).stem)


def clear(manifest: Manifest) -> None:
    """Delete all records of a manifest."""
    for name in names_in(manifest.folder):
        drop(manifest.folder / name)
