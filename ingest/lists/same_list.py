"""Checks that a list begins with the rows that were ingested before, by the hash of its rows in each shard's record."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ingest.folder.ledger import Segment
from ingest.lists.sources import Part
from roclip.data.shards import SHARD_DIGITS, ShardRecord
from roclip.errors import DataError


class _List(Protocol):
    def parts(self, samples_per_shard: int, start_row: int = 0) -> Iterator[Part]: ...


def rows_sha256(table: pa.Table, columns: Sequence[str]) -> str:
    """A hash of the rows of a table over these text columns; null counts as the empty text."""
    state = hashlib.sha256()
    for row in zip(*(table.column(name).to_pylist() for name in columns), strict=True):
        for value in row:
            content = (value or "").encode("utf-8", "surrogatepass")
            state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()


def check_same(
    source: _List, segment: Segment, sealed: Mapping[int, ShardRecord], columns: Sequence[str], root: Path
) -> None:
    """Read the list as far as it was ingested, and raise `DataError` for the first sealed shard whose rows it does not have.

    Args:
        source: The list.
        segment: The shard numbers to check.
        sealed: Records by shard number.
        columns: The columns that identify a row.
        root: The folder of the shards, for the error.
    """
    missing = segment.numbers(sealed)
    if not missing:
        return
    last = missing[-1]
    for number, part in enumerate(source.parts(segment.samples_per_shard, segment.first_row), segment.first_shard):
        if number in sealed and number <= last:
            record, rows = sealed[number], part.table.slice(0, segment.rows_of(number))
            if len(rows) != record.urls:
                raise _other_list(root, number, record, f"{len(rows)} rows")
            if record.rows_sha256 and rows_sha256(rows, columns) != record.rows_sha256:
                raise _other_list(root, number, record, f"{len(rows)} other rows")
            missing.remove(number)
        if number >= last:
            break
    if missing:
        raise _other_list(root, missing[0], sealed[missing[0]], "no rows")


def _other_list(root: Path, number: int, record: ShardRecord, got: str) -> DataError:
    return DataError(
        f"{root}: expected the shards of this URL list, but {number:0{SHARD_DIGITS}d}.tar was sealed for {record.urls} URLs "
        f"and the list has {got} there. Use another folder for another list or another ingest.samples_per_shard."
    )
