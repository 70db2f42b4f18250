"""The rows that failed and may do better now, out of the parquets of sealed shards: the parts of a later pass.

How many rows each shard gives is what its record says, so that of all the parquets only those are read that a part
needs. Memory: one part and one parquet.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roclip.data.outcomes import is_passing, reason_of
from roclip.data.shards import ShardRecord
from roclip.errors import ShardError
from roclip.storage import content_of

RETRY_OF = "retry_of"
"""Column of a later pass: the key under which the row stands in the shard where it failed first."""
_MEASURED = ("width", "height", "original_width", "original_height", "exif", "sha256", "phash", "flags")
_FOUND = frozenset(("key", "status", "error_message", *_MEASURED))
"""Columns of a shard's parquet that say what was found; the others are the list's."""


@dataclass(frozen=True)
class RetryPart:
    """One part of a pass."""

    position: int
    """In the pass, from 0."""
    table: pa.Table
    """The list's columns and `retry_of`."""
    retried: dict[str, int]
    """Rows by the reason for which they failed before."""


def passing_reasons(records: Sequence[ShardRecord]) -> tuple[str, ...]:
    """Names of the reasons in these records after which a row may be tried again."""
    return tuple(sorted({reason for record in records for reason in record.failed if is_passing(reason)}))


def rows_again(record: ShardRecord, reasons: Sequence[str]) -> int:
    """Rows of a shard that failed for one of the reasons."""
    return sum(record.failed.get(reason, 0) for reason in reasons)


def parts_again(
    root: Path,
    records: Sequence[ShardRecord],
    reasons: Sequence[str],
    samples_per_shard: int,
    wanted: Callable[[int], bool],
) -> Iterator[RetryPart]:
    """The wanted parts of the rows that failed in these shards for one of the reasons, in order.

    Raises `ShardError` for a parquet that cannot be read or has fewer such rows than its record says.
    """
    ends = list(accumulate(rows_again(record, reasons) for record in records))
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
    """Reads the failed rows of a shard, and remembers those of the last one."""

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
            failed = zip(*(table.column(name).to_pylist() for name in _JUDGED), strict=True)
            rows = [(row, reason) for row, known in enumerate(failed) if (reason := _reason(*known)) in self.reasons]
        except (OSError, ValueError, KeyError) as error:
            raise ShardError(
                f"{path}: expected the rows of {record.name} and what became of them, got {error}. Bring it back, or set "
                "ingest.retry_passes=0."
            ) from error
        if len(rows) != (told := rows_again(record, tuple(self.reasons))):
            raise ShardError(
                f"{path}: expected {told} rows that failed for a passing reason, as the record says, got {len(rows)}. "
                "Bring the parquet back, or set ingest.retry_passes=0."
            )
        failed = table.take(pa.array([row for row, _ in rows], pa.int64()))
        first = failed.column(RETRY_OF if RETRY_OF in failed.column_names else "key")
        failed = failed.select([name for name in failed.column_names if name not in _FOUND and name != RETRY_OF])
        return failed.append_column(RETRY_OF, first).append_column(_REASON, pa.array([r for _, r in rows], pa.string()))


_JUDGED = ("caption", "status", "error_message")


def _reason(caption: str | None, status: str, message: str | None) -> str:
    """As `ingest.shard.verify` counts it; empty for a row that did not fail or has no caption."""
    return "" if status == "success" or not (caption or "").strip() else reason_of(message or "")
