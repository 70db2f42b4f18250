"""The rows of a part as they enter a shard: texts made clean, and what became of each of them.

A list may hold any bytes where text should be. Captions, URLs and carried columns leave here as UTF-8; a caption also without
control characters, and no longer than a caption is. Rows that no sample can come of are known before anything is fetched.
"""

import datetime
import decimal
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.sources import Part
from roclip.shards import sample_key

MAX_CAPTION_BYTES = 64 * 2**10
CUT_CAPTION_CHARS = 1024
"""What is kept of a longer caption, in the parquet only."""
EXPECTED = ("expected_md5", "expected_sha256", "expected_phash")
"""Columns with which a list says what it has seen at a URL."""
CAPTION_CLEANED = "caption_cleaned"
"""Flag of a row whose caption held control characters or was not UTF-8."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Fate:
    """What became of one row: img2dataset's columns of the same names, and ours."""

    status: str
    error_message: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    sha256: str | None = None
    """Of the bytes as fetched."""
    phash: int | None = None
    """Of the picture before it was resized (`ingest.phash`)."""
    flags: tuple[str, ...] = ()


class Rows:
    """The rows of one part.

    Args:
        left_out: Row -> why it is not to be fetched, a text that begins with a name of `ingest.reasons`.
    """

    def __init__(self, part: Part, samples_per_shard: int, left_out: Mapping[int, str] | None = None):
        self.number = part.number
        self._first = part.number * samples_per_shard
        self._per_shard = samples_per_shard
        table = part.table.combine_chunks()
        captions = [_clean(caption) for caption in _bytes(table["caption"])]
        self.hopeless = {row: caption.problem for row, caption in enumerate(captions) if caption.problem}
        self.hopeless.update(left_out or {})
        """Row -> why it is not fetched."""
        self.cleaned = {row for row, caption in enumerate(captions) if caption.cleaned}
        """Rows that get the flag `CAPTION_CLEANED`."""
        columns = {name: _valid(table[name]) for name in table.column_names}
        columns["caption"] = pa.array([caption.text for caption in captions], pa.string())
        self.table = pa.table(columns)
        """As given, with clean texts."""
        self._columns = dict(zip(self.table.column_names, self.table.columns, strict=True))

    def __len__(self) -> int:
        return len(self.table)

    def key(self, row: int) -> str:
        return sample_key(self._first + row, self._per_shard)

    def row(self, key: str) -> int:
        return int(key) - int(self.key(0))

    def text(self, name: str, row: int) -> str:
        """A value of a text column; nothing is ""."""
        return self._columns[name][row].as_py() or ""

    def expected(self, row: int) -> dict[str, Any]:
        """`md5`, `sha256`, `phash` -> what the list expects of this row, where it does."""
        found = {name: self._columns[name][row].as_py() for name in EXPECTED if name in self._columns}
        found = {name.removeprefix("expected_"): value for name, value in found.items() if value not in (None, "")}
        return {name: value.strip().lower() if isinstance(value, str) else value for name, value in found.items()}

    @property
    def digests(self) -> tuple[str, ...]:
        """Hashes of an answer's bytes that are needed: sha256, and md5 where the list has it."""
        return ("sha256", "md5") if "expected_md5" in self._columns else ("sha256",)

    def urls(self) -> pa.Table:
        """The one column `url`, with nothing in it where a row is not fetched."""
        urls = self.table["url"].to_pylist()
        for row in self.hopeless:
            urls[row] = ""
        return pa.table({"url": pa.array(urls, pa.string())})

    def note(self, row: int, fate: Fate, *, exif: bool) -> bytes:
        """The json member of a sample: the keys of img2dataset, then `phash` in hexadecimal and `flags`."""
        given = {name: _plain(column, row) for name, column in self._columns.items()}
        known = {**vars(fate), "phash": None if fate.phash is None else f"{fate.phash:016x}"}
        if not exif:
            del known["exif"]
        return json.dumps({**given, "key": self.key(row), **known}, allow_nan=False).encode()

    def write(self, parquet: Path, fates: Sequence[Fate], *, exif: bool) -> None:
        """Write the fate of each row, in the order of the rows: the same fates give the same bytes."""
        fields = [
            *self.table.schema,
            pa.field("key", pa.string()),
            *(field for field in _FATE if exif or field.name != "exif"),
        ]
        columns = [*self.table.columns, pa.array([self.key(row) for row in range(len(self))], pa.string())]
        for field in fields[len(columns) :]:
            columns.append(pa.array([getattr(fate, field.name) for fate in fates], field.type))
        pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), parquet)


_FATE = pa.schema(
    [
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("flags", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class _Caption:
    text: str
    cleaned: bool = False
    problem: str = ""


def _clean(raw: bytes) -> _Caption:
    try:
        given, damaged = raw[: MAX_CAPTION_BYTES + 1].decode(), False
    except UnicodeDecodeError:
        given, damaged = raw[: MAX_CAPTION_BYTES + 1].decode(errors="replace"), True
    text = _CONTROL.sub(" ", given)
    if len(raw) > MAX_CAPTION_BYTES:
        problem = f"caption_too_long: {len(raw)} bytes, more than {MAX_CAPTION_BYTES}"
        return _Caption(text[:CUT_CAPTION_CHARS], problem=problem)
    problem = "" if text.strip() else "empty_caption: no caption"
    return _Caption(text, damaged or text != given, problem)


def _bytes(column: pa.ChunkedArray) -> list[bytes]:
    return [value or b"" for value in column.cast(pa.large_binary()).to_pylist()]


def _valid(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """The same column with texts that are UTF-8; one of another type that is not valid holds nothing any more."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return pa.array([value.decode(errors="replace") for value in _bytes(column)], column.type)
        return pa.nulls(len(column), column.type)
    return column


def _plain(column: pa.ChunkedArray, row: int) -> Any:
    """A value as JSON can hold it: numbers that are none become null, and what JSON does not know, its text."""
    try:
        return _jsonable(column[row].as_py())
    except Exception:  # a date of the year 20000, which Python does not know
        return None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    return value
