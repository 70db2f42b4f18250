"""Ingest on Ray: a list of URLs becomes sealed shards. This file is the order of things; read it first.

    lease      one ingest at a time fills a folder                                    ingest/folder/lease.py
    list       its parts are streamed, those that are not sealed are fetched          ingest/folder/ledger.py,
    cluster/ingest/tasks.py
    passes     what failed in a passing way is fetched again, into new shards         ingest/folder/retries.py
    more       rows that the list has got since it was last read are its next parts
    release    shards that `ingest.quarantine` held back are published
    end        the manifest says that no more will come

What is sealed when this process dies stays sealed; calling `ingest` again does the rest. Shards never pass through Ray's
object store: tasks write to the folder, which all nodes must see, or put them on a store.
"""

import itertools
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from cluster.ingest.rate_limiter import desks_needed, host_desks
from cluster.ingest.task import OUTAGE_URLS, Order, copied, work_folder
from cluster.ingest.tasks import Stopped, Tasks
from cluster.monitoring.publisher import count
from ingest.folder.lease import Lease
from ingest.folder.ledger import Ledger, Segment
from ingest.folder.retries import parts_again, passing_reasons, rows_again
from ingest.lists.configured import open_list
from ingest.lists.same_list import check_same, rows_sha256
from ingest.lists.sources import Part, UrlList
from roclip.config import Config
from roclip.data.shards import HELD, Manifest, ShardRecord
from roclip.errors import ConfigError, DataError
from roclip.report.ingest_progress import IngestProgress, ShardCounts
from roclip.storage import drop, names_in

Release = Callable[[Path, tuple[ShardRecord, ...]], Iterable[ShardRecord]]
"""(shards, held records) -> the records to publish in their place. It may write smaller indexes, each atomically; it is
called again for the same records when it, or what comes after it, was cut short."""


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

    Needs a Ray that is initialised. `shards` is a folder that all nodes see, or a place on a store. The list's columns
    and limit are those of `config.data` where that names a URL list; a list that the embedded origin wrote has the
    columns `url` and `caption` and is taken whole. A list whose beginning is what was ingested before gives new shards
    for the rest; an ingest that has ended, of a list that has not changed, does nothing.

    Returns `{"urls", "succeeded", "failed": {reason: rows}, "shards", "images_per_s", "wall_s"}`: counts over
    all sealed shards, rate and time of this call. A row that was fetched again counts once, as it ended. When `stop` is
    set, tasks are cancelled and the summary of what is sealed by then is returned; the manifest is not ended.
    `run` names the tasks and the metrics; empty takes the list's name.

    Raises `DataError` for a shard in which more than `data.max_bad_frac` of what arrived is of no use, or
    when `shards` holds the shards of another list; `StageError` when a shard fails more than
    `ingest.shard_retries` times; `RunLockedError` when another ingest fills `shards`. What is sealed stays sealed.
    """
    if config.ingest.quarantine and release is None:
        raise ConfigError("ingest.quarantine: expected a way to release what is held back, got none. Set it to [].")
    if isinstance(shards, Path):
        shards = shards.resolve()  # a worker may stand in another folder
    source = open_list(config, urls)
    if (summary := ended(config, source, shards)) is not None:
        return summary
    with Lease(shards) as lease:
        return _Ingest(config, source, shards, lease, on_progress, stop or threading.Event(), release, run).run()


def ended(config: Config, source: UrlList, shards: Path) -> dict | None:
    """The summary of an ingest that has nothing to do."""
    summary, ledger = Manifest(shards).summary, Ledger(shards)
    if summary is None or not ledger.segments or any(segment.digest != source.digest for segment in ledger.lists):
        return None
    passes_left = ledger.segments[-1].pass_number < config.ingest.retry_passes and summary.get("passing", 1)
    return None if passes_left else summary


class _Ingest:
    """One call, under the lease."""

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
        self.sealed = {number_of(record): record for record in (*self.held.records(), *published)}
        self.tally = ShardCounts(tuple(self.sealed.values()))
        self.ledger = Ledger(root, lease.ticket.check)
        self.segment: Segment | None = None
        self.desks: tuple[str, ...] = ()
        self.again_done = self.rows_read = 0
        # Of a list that the embedded origin wrote, the URLs change with its port.
        self.identity = ("url", "caption") if config.data.urls else ("caption",)
        self.tasks = Tasks(config, self.run_name, lease, self.stop, on_sealed=self._seal, on_step=self._tell)

    def run(self) -> dict:
        """All of it, from where it stands."""
        self._check_list()
        self.manifest.reopen()
        work = work_folder(self.root)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            for segment in self._segments():
                self.segment = segment
                self.again_done = sum(self.sealed[number].urls for number in segment.numbers(self.sealed))
                # Desks of its own: what was down while the list was read is asked again in a later pass.
                with host_desks(self.config.ingest.policy, self.run_name, desks_needed()) as self.desks:
                    self.tasks.run(self._orders(segment))
            self._publish_held()
        except Stopped:
            return self.tally.summary()
        finally:
            self.tasks.cancel()
            shutil.rmtree(work, ignore_errors=True)
        summary = {**self.tally.summary(), "passing": self._passing_left()}
        self.lease.ticket.check()
        self.manifest.finish(summary)
        self._tell()
        return summary

    def _check_list(self) -> None:
        """Raise `DataError` when the sealed shards are not of this list."""
        if not self.ledger.segments:
            fresh = Segment(
                0, self.per_shard, list_name=self.source.name, digest="" if self.sealed else self.source.digest
            )
            self.ledger.add(fresh)
        if (before := self.ledger.segments[0].samples_per_shard) != self.per_shard:
            raise DataError(
                f"{self.root}: expected ingest.samples_per_shard={before}, with which this ingest began, got "
                f"{self.per_shard}. Use another folder for another number."
            )
        for segment in self.ledger.lists:
            numbers = segment.numbers(self.sealed)
            if segment.rows is None and numbers and (urls := self.sealed[numbers[-1]].urls) < self.per_shard:
                rows = (numbers[-1] - segment.first_shard) * self.per_shard + urls  # only the last part is short
                segment = self.ledger.end(segment, rows)
            if segment.digest != self.source.digest:
                check_same(self.source, segment, self.sealed, self.identity, self.root)
                self.ledger.seen(segment, self.source.name, self.source.digest)

    def _segments(self) -> Iterator[Segment]:
        """The segments to be worked on, one after another: each is asked for when the one before it is sealed."""
        yield self.ledger.segments[-1]
        while True:
            while (again := self._next_pass()) is not None:
                yield again
            if (grown := self._rows_since()) is None:
                return
            yield grown

    def _next_pass(self) -> Segment | None:
        """The pass after the last segment, written down; None when there is nothing to fetch again, or enough was tried."""
        last = self.ledger.segments[-1]
        records = [self.sealed[number] for number in last.numbers(self.sealed)]
        reasons = passing_reasons(records)
        rows = sum(rows_again(record, reasons) for record in records)
        if last.pass_number >= self.config.ingest.retry_passes or not rows:
            return None
        number = last.pass_number + 1
        return self.ledger.add(
            Segment(self.ledger.next_shard, self.per_shard, pass_number=number, reasons=reasons, rows=rows)
        )

    def _rows_since(self) -> Segment | None:
        """A segment for the rows that the list has got since its last one ended, written down; None where there are none."""
        last = self.ledger.lists[-1]
        start = last.first_row + (last.rows or 0)
        if next(self.source.parts(self.per_shard, start), None) is None:
            return None
        return self.ledger.add(
            Segment(
                self.ledger.next_shard, self.per_shard, start, list_name=self.source.name, digest=self.source.digest
            )
        )

    def _orders(self, segment: Segment) -> Iterator[Order]:
        """What is left to do of a segment; at its end its length is written down."""
        if segment.pass_number:
            yield from self._orders_again(segment)
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
                    self._order(number, copied(table), rows_sha256(table, self.identity)),
                    max_bad_frac=self.config.data.max_bad_frac,
                    outage_urls=OUTAGE_URLS,
                )
        rows = self.rows_read - segment.first_row
        if rows != (segment.rows or rows):
            raise DataError(
                f"{self.root}: expected {segment.rows} rows of the list from row {segment.first_row} on, as when it was "
                f"first read, got {rows}. Bring the whole list back."
            )
        self.segment = self.ledger.end(segment, rows)

    def _orders_again(self, segment: Segment) -> Iterator[Order]:
        before = self.ledger.segments[self.ledger.segments.index(segment) - 1]
        records = [self.sealed[number] for number in before.numbers(self.sealed)]
        first = segment.first_shard
        for again in parts_again(
            self.root, records, segment.reasons, self.per_shard, lambda position: first + position not in self.sealed
        ):
            digest = rows_sha256(again.table, ("retry_of",))
            yield replace(self._order(first + again.position, again.table, digest), retried=again.retried)

    def _order(self, number: int, table: pa.Table, digest: str) -> Order:
        return Order(
            Part(number, table),
            self.root,
            self.config.ingest,
            self.lease.ticket,
            digest,
            outage_urls=len(table) + 1,
            held=bool(self.config.ingest.quarantine),
            desks=self.desks,
            run=self.run_name,
        )

    def _seal(self, record: ShardRecord) -> None:
        """Take in a shard that a task has sealed."""
        self.sealed[number_of(record)] = record
        self.tally.add(record)
        self.again_done += record.urls
        if self.config.ingest.quarantine:
            self.held.pack()
        else:
            self.published += 1
            self.manifest.pack()

    def _publish_held(self) -> None:
        """Publish what was held back, as `release` gives it; safe to be cut short anywhere."""
        held = self.held.records()
        if not held:
            return
        assert self.release is not None
        known = {record.name for record in self.manifest.records()}
        for record in self.release(self.root, held):
            self.tally.correct(self.sealed[number_of(record)], record)
            self.sealed[number_of(record)] = record
            if record.name not in known:
                self.lease.check()
                self.manifest.publish(record)
                self.published += 1
        self.lease.ticket.check()
        clear(self.held)

    def _passing_left(self) -> int:
        """Rows that a further pass would fetch again."""
        last = self.ledger.segments[-1]
        records = [self.sealed[number] for number in last.numbers(self.sealed)]
        return sum(rows_again(record, passing_reasons(records)) for record in records)

    def _tell(self) -> None:
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
        again = segment if segment is not None and segment.pass_number else None
        again_total = (again.rows or 0) if again else 0
        left = again_total - self.again_done if again else None if total is None else total - self.tally.urls
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
            pass_number=again.pass_number if again else 0,
            again_done=self.again_done if again else 0,
            again_total=again_total,
            estimated=estimated,
        )

    def _total(self) -> tuple[int | None, bool]:
        """Rows of the list, and whether that is a guess."""
        if self.source.rows is not None:
            return self.source.rows, False
        if self.ledger.lists and (rows := self.ledger.lists[-1].rows) is not None:
            return self.ledger.lists[-1].first_row + rows, False
        frac = self.source.read_frac
        return (max(self.rows_read, round(self.rows_read / frac)), True) if frac and self.rows_read else (None, True)

    def _shards_of(self, rows: int) -> int:
        """Shards of all segments that there are, when the list has so many rows."""
        last = self.ledger.segments[-1] if self.ledger.segments else None
        if last is None:
            return -(-rows // self.per_shard)
        return last.first_shard + (last.shards or -(-(rows - last.first_row) // self.per_shard))


def number_of(record: ShardRecord) -> int:
    """The number in a shard's name."""
    return int(Path(record.name).stem)


def clear(manifest: Manifest) -> None:
    """Delete all records of a manifest."""
    for name in names_in(manifest.folder):
        drop(manifest.folder / name)
