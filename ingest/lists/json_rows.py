"""Reads the rows of jsonl files (one object per line) and json files (one array of objects, or one object of columns as pandas
writes it), with at most one value of the file in memory.

An element that is not an object becomes a row of nulls. A value that does not fit its column's type, which the first rows
determine, becomes null, except in a text column, where it is stored as JSON.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from ingest.lists.files import ROW_BYTES, lines_of

HEAD_ROWS = 1000
HEAD_BYTES = 2**20
"""Columns and types come from the first rows: at most `HEAD_ROWS`, or this many bytes."""
BATCH_ROWS = 1024
BATCH_BYTES = 16 * 2**20
_CHUNK = 2**16
_DECODER = json.JSONDecoder(strict=False)  # allow line ends and NUL within strings
_INT64 = range(-(2**63), 2**63)
_EXPECTED = "A json holds one array of objects or one object of columns, a jsonl one object per line"
NESTED = pa.struct([])
"""Marks a column of lists or objects, which is read as text: their JSON."""
Row = dict[str, Any]


def lines_head(stream: BinaryIO) -> tuple[pa.Schema, int | None]:
    """The columns of a jsonl, and its number of rows if that is zero."""
    rows = list(_head((_parse_line(line), len(line or b"")) for line in lines_of(stream)))
    return _schema(rows), None if rows else 0


def read_lines(stream: BinaryIO, schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return _batches(((_parse_line(line), len(line or b"")) for line in lines_of(stream)), schema, columns)


def values_head(stream: BinaryIO) -> tuple[pa.Schema, int | None]:
    """The columns of a json, and its number of rows if known; an object of columns is read completely. Raises `ValueError`."""
    values = _Values(stream)
    if not values.peek():
        return pa.schema([]), 0
    if values.peek() == "[":
        rows = list(_head(values.rows()))
        return _schema(rows), None if rows else 0
    heads: dict[str, list[Any]] = {}
    counts: dict[str, int] = {}
    for column in values.members():
        name, heads[name], counts[name] = str(column), [], 0
        for _ in values.members():
            value = values.take()
            counts[name] += 1
            if counts[name] <= HEAD_ROWS:
                heads[name].append(value)
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected columns of one length, got {counts}")
    return pa.schema([(name, _type(column)) for name, column in heads.items()]), max(counts.values(), default=0)


def read_values(
    open_stream: Callable[[bool], BinaryIO], schema: pa.Schema, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of a json. An object of columns is opened once per column, and the columns are read side by side.

    `open_stream(counted)` opens the file; `counted` says whether its bytes count as progress. Raises `ValueError`.
    """
    with open_stream(True) as stream:
        values = _Values(stream)
        if values.peek() == "[":
            yield from _batches(values.rows(), schema, columns)
            return
    streams = [open_stream(name == columns[0]) for name in columns]
    try:
        named = [_Values(stream).column(name) for stream, name in zip(streams, columns, strict=True)]
        yield from _batches(_side_by_side(named, columns), schema, columns)
    finally:
        for stream in streams:
            stream.close()


class _Values:
    """A streaming JSON parser that returns one value at a time."""

    def __init__(self, stream: BinaryIO):
        self._stream = io.TextIOWrapper(stream, "utf-8", newline="")
        self._text, self._at, self._ended = "", 0, False
        self._read = 0

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._fill(_CHUNK)

    def take(self) -> Any:
        """The next value. Raises `ValueError` for invalid JSON and for a value longer than `ROW_BYTES`."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may continue in the next chunk
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError(f"values nested too deeply, {self._position()}") from None
            except ValueError as error:
                if self._ended or len(self._text) - self._at > ROW_BYTES:
                    raise ValueError(f"no JSON value {self._position()} ({error.args[0].split(':')[0]})") from None
            self._fill(max(_CHUNK, len(self._text) - self._at))

    def members(self) -> Iterator[str | int]:
        """Key or index of each member of the next array or object. The caller takes the value."""
        close = {"[": "]", "{": "}"}[self._expect_mark("[{")]
        if self.peek() == close:
            self._expect_mark(close)
            return
        for number in itertools.count():
            if close == "]":
                yield number
            else:
                key = self.take()
                self._expect_mark(":")
                yield str(key)
            if self._expect_mark("," + close) == close:
                return

    def rows(self) -> Iterator[tuple[Row | None, int]]:
        """The elements of an array, with their lengths in characters."""
        for _ in self.members():
            start = self._read - len(self._text) + self._at
            row = self.take()
            yield row if isinstance(row, dict) else None, self._read - len(self._text) + self._at - start
        self.end()

    def column(self, name: str) -> Iterator[tuple[str | int, Any]]:
        """Key and value of each row of one column, in an object of columns."""
        for column in self.members():
            for key in self.members():
                value = self.take()
                if column == name:
                    yield key, value
        self.end()

    def end(self) -> None:
        if self.peek():
            raise ValueError(f"more than one value {self._position()}. {_EXPECTED}")

    def _expect_mark(self, marks: str) -> str:
        mark = self.peek()
        if not mark or mark not in marks:
            raise ValueError(f"no {' or '.join(marks)} {self._position()} but {mark or 'the end'}. {_EXPECTED}")
        self._at += 1
        return mark

    def _fill(self, size: int) -> None:
        text = self._stream.read(size)
        self._ended = len(text) < size
        self._text, self._at = self._text[self._at :] + text, 0
        self._read += len(text)

    def _position(self) -> str:
        return f"at character {self._read - len(self._text) + self._at}"


def _parse_line(line: bytes | None) -> Row | None:
    text = (line or b"").decode()
    try:
        row, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and end == len(text) else None


def _side_by_side(named: list[Iterator[tuple[str | int, Any]]], columns: list[str]) -> Iterator[tuple[Row, int]]:
    for row in itertools.zip_longest(*named):
        if None in row or len({key for key, _ in row}) > 1:
            raise ValueError(f"the columns {', '.join(columns)} are not of the same rows")
        values = [value for _, value in row]
        yield dict(zip(columns, values, strict=True)), sum(len(value) for value in values if isinstance(value, str))


def _head(rows: Iterable[tuple[Row | None, int]]) -> Iterator[Row | None]:
    size = 0
    for row, length in itertools.islice(rows, HEAD_ROWS):
        yield row
        size += length
        if size >= HEAD_BYTES:
            return


def _schema(rows: list[Row | None]) -> pa.Schema:
    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in (row or {}).items():
            columns.setdefault(name, []).append(value)
    return pa.schema([(name, _type(values)) for name, values in columns.items()])


def _type(values: list[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pa.null()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int} and all(value is None or value in _INT64 for value in values):
        return pa.int64()
    if kinds <= {int, float}:
        return pa.float64()
    return NESTED if kinds <= {dict, list} else pa.string()


def _batches(rows: Iterable[tuple[Row | None, int]], schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
    types = [schema.field(name).type for name in columns]
    batch: list[Row] = []
    size = 0
    for row, length in rows:
        batch.append(row or {})
        size += length
        if len(batch) == BATCH_ROWS or size >= BATCH_BYTES:
            yield _batch(batch, columns, types)
            batch, size = [], 0
    if batch:
        yield _batch(batch, columns, types)


def _batch(rows: list[Row], columns: list[str], types: list[pa.DataType]) -> pa.RecordBatch:
    arrays = [_array([row.get(name) for row in rows], kind) for name, kind in zip(columns, types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=columns)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.bool_():
        return pa.array([value if isinstance(value, bool) else None for value in values], kind)
    if kind == pa.int64():
        return pa.array([value if type(value) is int and value in _INT64 else None for value in values], kind)
    if kind == pa.float64():
        return pa.array([float(value) if type(value) in (int, float) else None for value in values], kind)
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can escape
        return pa.array([text and text.encode("utf-8", "replace").decode() for text in texts], pa.string())
