"""The parts of a retry pass: the rows that failed for a transient reason, read from the parquets of sealed shards.

The number of such rows in each shard is taken from its record, so only the parquets that a part needs are read. Memory: one
part and one parquet.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roclip.data.outcomes import is_transient, reason_of
from roclip.data.shards import ShardRecord
from roclip.errors import ShardError
from roclip.storage import content_of

RETRY_OF = "retry_of"
"""Column of a retry pass: the key of the row in the shard where it failed first."""
_MEASUREMENTS = ("width", "height", "original_width", "original_height", "exif", "sha256", "phash", "flags")
_OUTCOME_COLUMNS = frozenset(("key", "status", "error_message", *_MEASUREMENTS))
"""Columns of a shard's parquet that hold outcomes; the others are the list's."""


@dataclass(frozen=True)
class RetryPart:
    """One part of a retry pass."""

    position: int
    """In the pass, from 0."""
    table: pa.Table
    """The list's columns and `retry_of`."""
    retried: dict[str, int]
    """Number of rows by the reason for which they failed before."""


def transient_reasons(records: Sequence[ShardRecord]) -> tuple[str, ...]:
    """The reasons in these records for which a row is worth a retry."""
    return tuple(sorted({reason for record in records for reason in record.failed if is_transient(reason)}))


def retry_rows(record: ShardRecord, reasons: Sequence[str]) -> int:
    """Number of rows of a shard that failed for one of the reasons."""
    return sum(record.failed.get(reason, 0) for reason in reasons)


def retry_parts(
    root: Path,
    records: Sequence[ShardRecord],
    reasons: Sequence[str],
    samples_per_shard: int,
    wanted: Callable[[int], bool],
) -> Iterator[RetryPart]:
    """The wanted parts of the rows that failed in these shards for one of the reasons, in order.

    Args:
        root: The folder of the shards.
        records: The shards.
        reasons: The failure reasons.
        samples_per_shard: Rows per part.
        wanted: Whether the part at a position is needed.

    Raises `ShardError` for a parquet that cannot be read or whose number of such rows differs from its record.
    """
    ends = list(accumulate(retry_rows(record, reasons) for record in records))
    total, read = ends[-1] if ends else 0, _Reader(root, reasons)
    for position, start in enumerate(range(0, total, samples_per_shard)):
        if not wanted(position):
            continue
        stop, pieces = min(total, start + samples_per_shard), []
        shard = bisect_right(ends, start)
        while start < stop:
            begin = ends[shard - 1] if shard else 0
            if ends[shard] > start:
                pieces.append(read(records[shard]).slice(start - begin, stop - start))
                start = min(stop, ends[shard])
            shard += 1
        table = pa.concat_tables(pieces, promote_options="permissive")
        reason = table.column(_REASON).to_pylist()
        yield RetryPart(position, table.drop_columns([_REASON]), dict(Counter(reason)))


_REASON = "_reason"


class _Reader:
    """Reads the failed rows of a shard, and caches those of the last one."""

    def __init__(self, root: Path, reasons: Sequence[str]):
        self.root, self.reasons = root, frozenset(reasons)
        self._last: tuple[str, pa.Table] = "", pa.table({})

    def __call__(self, record: ShardRecord) -> pa.Table:
        if self._last[0] != record.name:
            self._last = record.name, self._read(record)
        return self._last[1]

    def _read(self, record: ShardRecord) -> pa.Table:
        path = self.root / f"{Path(record.name).stem}.parquet"
        try:
            table = pq.read_table(pa.BufferReader(content_of(path))).sort_by("key")
            failed = zip(*(table.column(name).to_pylist() for name in _STATUS_COLUMNS), strict=True)
            rows = [(row, reason) for row, known in enumerate(failed) if (reason := _reason(*known)) in self.reasons]
        except (OSError, ValueError, KeyError) as error:
            raise ShardError(
                f"{path}: expected the rows of {record.name} and their outcomes, got {error}. Restore it, or set "
                "ingest.retry_passes=0."
            ) from error
        if len(rows) != (expected := retry_rows(record, tuple(self.reasons))):
            raise ShardError(
                f"{path}: expected {expected} rows with a transient failure, as in the record, got {len(rows)}. "
                "Restore the parquet, or set ingest.retry_passes=0."
            )
        failed = table.take(pa.array([row for row, _ in rows], pa.int64()))
        first = failed.column(RETRY_OF if RETRY_OF in failed.column_names else "key")
        failed = failed.select(
            [name for name in failed.column_names if name not in _OUTCOME_COLUMNS and name != RETRY_OF]
        )
        return failed.append_column(RETRY_OF, first).append_column(_REASON, pa.array([r for _, r in rows], pa.string()))


_STATUS_COLUMNS = ("caption", "status", "error_message")


def _reason(caption: str | None, status: str, message: str | None) -> str:
    """The reason as `ingest.shard.verify` counts it; empty for a row that did not fail or has no caption."""
    return "" if status == "success" or not (caption or "").strip() else reason_of(message or "")
