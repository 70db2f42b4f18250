"""Reads one file of a URL list: first its head (columns, and the number of rows if known), then its rows in batches.

Every row of a file is a row of the list. A malformed row becomes a row of nulls, which has no URL and fails as `bad_url`: a csv
or tsv row with a wrong number of fields, a jsonl line or an element of a json array that is not an object, a line of jsonl or
txt of more than `ROW_BYTES`. If the end of a row cannot be found, the file is an error. Blank lines are not rows. A tsv may
quote as a csv does, and quoted fields of both may contain line ends.
"""

import csv
import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from ingest.lists import json_rows
from ingest.lists.files import ROW_BYTES, ListFile, lines_of, open_bytes, open_text
from roclip.errors import UrlListError

BATCH_ROWS = 4096
BLOCK_BYTES = ROW_BYTES
"""Block size of the csv reader: a row must fit into a block."""
_HEADER_BYTES = 2**20
_PAGE_BYTES = 2**20
_UNREADABLE = (pa.ArrowException, OSError, EOFError, ValueError, csv.Error)
Count = Callable[[int], None]
"""Called with the number of bytes read."""


@dataclass(frozen=True)
class Head:
    """The facts about a file that are known before its rows are read."""

    schema: pa.Schema
    """Its columns; csv and tsv columns are text. A txt has none: its lines are URLs."""
    rows: int | None = None
    """None if the file has to be read to count them; an empty file is always known."""
    groups: tuple[int, ...] = ()
    """Rows of each row group of a parquet."""

    def groups_before(self, row: int) -> int:
        """Number of row groups that lie completely before a row."""
        return sum(end <= row for end in itertools.accumulate(self.groups))


def read_head(file: ListFile) -> Head:
    """Read a file's head. Raises `UrlListError` for a file that cannot be read."""
    try:
        if file.format == "parquet":
            with open_bytes(file) as stream:
                metadata = pq.read_metadata(stream)
                groups = tuple(metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))
                return Head(metadata.schema.to_arrow_schema(), sum(groups), groups)
        with open_text(file) as stream:
            if file.format == "jsonl":
                return Head(*json_rows.lines_head(stream))
            if file.format == "json":
                return Head(*json_rows.values_head(stream))
            if file.format == "txt":
                return Head(pa.schema([]), None if any(True for _ in lines_of(stream)) else 0)
            return _csv_head(stream, _delimiter(file))
    except _UNREADABLE as error:
        raise _unreadable(file, error, "") from error


def read_rows(
    file: ListFile, head: Head, columns: list[str], count: Count, groups: int = 0
) -> Iterator[pa.RecordBatch]:
    """Read rows with these columns, in batches of any size. Of a parquet, the first `groups` row groups are skipped.

    A txt has a single column, named by the first of `columns`. Raises `UrlListError`, which names the row from which on the
    file cannot be read.
    """
    rows = sum(head.groups[:groups])
    try:
        for batch in _batches(file, head, columns, count, groups):
            yield batch
            rows += len(batch)
    except _UNREADABLE as error:
        raise _unreadable(file, error, f" from row {rows} on, counted from 0,") from error


def _batches(file: ListFile, head: Head, columns: list[str], count: Count, groups: int) -> Iterator[pa.RecordBatch]:
    if file.format == "parquet":
        yield from _read_parquet(file, head, columns, groups)
        return
    if file.format == "json":
        yield from json_rows.read_values(
            lambda counted: open_text(file, count if counted else None), head.schema, columns
        )
        return
    with open_text(file, count) as stream:
        if file.format == "jsonl":
            yield from json_rows.read_lines(stream, head.schema, columns)
        elif file.format == "txt":
            yield from _read_txt(stream, columns[0])
        else:
            yield from _read_csv(stream, _delimiter(file), columns)


def _read_parquet(file: ListFile, head: Head, columns: list[str], groups: int) -> Iterator[pa.RecordBatch]:
    with open_bytes(file) as stream:
        # Streams pages instead of loading whole row groups.
        parquet = pq.ParquetFile(stream, buffer_size=_PAGE_BYTES, pre_buffer=False)
        if parquet.metadata.num_rows != head.rows:
            raise OSError(f"it had {head.rows} rows when ingest began and has {parquet.metadata.num_rows} now")
        left = list(range(groups, len(head.groups)))
        yield from parquet.iter_batches(batch_size=BATCH_ROWS, row_groups=left, columns=columns)


def _delimiter(file: ListFile) -> str:
    return "\t" if file.format == "tsv" else ","


def _csv_head(stream: BinaryIO, delimiter: str) -> Head:
    lines = io.StringIO(stream.read(_HEADER_BYTES).decode("utf-8", "ignore"), newline="")
    header = next((row for row in csv.reader(lines, delimiter=delimiter) if row), [])
    return Head(pa.schema([(name, pa.string()) for name in header]), None if lines.read().strip("\r\n") else 0)


def _read_csv(stream: BinaryIO, delimiter: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    malformed: deque[int] = deque()

    def keep(row: arrow_csv.InvalidRow) -> str:
        malformed.append(row.number - 2)  # the header is its row 1
        return "skip"

    reader = arrow_csv.open_csv(
        stream,
        arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),  # with threads, invalid rows have no number
        arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep),
        arrow_csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string())),
    )
    row = 0
    with reader:
        for batch in reader:
            if malformed:
                batch = batch.take(pa.array(_row_positions(row, len(batch), malformed), pa.int64()))
            row += len(batch)
            yield batch
    if malformed:
        yield pa.RecordBatch.from_arrays([pa.nulls(len(malformed), pa.string())] * len(columns), names=columns)


def _row_positions(row: int, rows: int, malformed: deque[int]) -> list[int | None]:
    """Indices of good rows, and None for malformed ones, in the order of the file; the first of them is its row `row`."""
    positions: list[int | None] = []
    good = 0
    while malformed and malformed[0] <= row + len(positions) + rows - good:
        before = malformed.popleft() - row - len(positions)
        positions += [*range(good, good + before), None]
        good += before
    return [*positions, *range(good, rows)]


def _read_txt(stream: BinaryIO, column: str) -> Iterator[pa.RecordBatch]:
    lines = lines_of(stream)
    while batch := list(itertools.islice(lines, BATCH_ROWS)):
        urls = pa.array(batch, pa.binary()).cast(pa.string())
        yield pa.RecordBatch.from_arrays([urls], names=[column])


def _unreadable(file: ListFile, error: Exception, where: str) -> UrlListError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UrlListError(f"{file}: this {file.format} file cannot be read{where} ({reason}). Write this file again.")
