"""The rows of a part: which are worth a request, and the outcome of each.

`ingest.lists.sources` delivers text and JSON values. Here captions lose their control characters, and rows that cannot give a
sample are marked before anything is fetched.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingest.lists.sources import Part
from roclip.data.shards import sample_key

MAX_CAPTION_BYTES = 64 * 2**10
CUT_CAPTION_CHARS = 1024
"""Characters that are kept of a longer caption, in the parquet only."""
EXPECTED = "expected_"
"""Prefix of the columns `md5`, `sha256` and `phash` with which a list states the hashes it saw at a URL."""
CAPTION_CLEANED = "caption_cleaned"
"""Flag of a row whose caption had control characters, which were replaced by spaces, or bytes that were not UTF-8."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_REPLACED = "\ufffd"


@dataclass(frozen=True)
class RowOutcome:
    """The outcome of one row: img2dataset's columns of the same names, and ours."""

    status: str
    error_message: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    exif: str | None = None
    sha256: str | None = None
    """sha256 of the bytes as fetched."""
    phash: int | None = None
    """Perceptual hash of the image before it was resized (`ingest.shard.phash`)."""
    flags: tuple[str, ...] = ()


class Rows:
    """The rows of one part.

    Args:
        part: The part.
        samples_per_shard: Rows per shard, for the keys.
        excluded: Maps rows that are not to be fetched to the reason, a text that begins with a name of `roclip.data.outcomes`.
    """

    def __init__(self, part: Part, samples_per_shard: int, excluded: Mapping[int, str] | None = None):
        self.number = part.number
        self._first = part.number * samples_per_shard
        self._per_shard = samples_per_shard
        table = part.table.combine_chunks()
        captions = [_clean(caption or "") for caption in table["caption"].to_pylist()]
        self.skipped = {row: caption.problem for row, caption in enumerate(captions) if caption.problem}
        self.skipped.update(excluded or {})
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
        """The value of a text column; "" for null."""
        return self._columns[name][row].as_py() or ""

    def expected(self, row: int) -> dict[str, Any]:
        """The hashes that the list expects of this row, by `md5`, `sha256` and `phash`."""
        names = [name for name in self._columns if name.startswith(EXPECTED)]
        found = {name.removeprefix(EXPECTED): self._columns[name][row].as_py() for name in names}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def digests(self) -> tuple[str, ...]:
        """The hashes that have to be computed over the bytes: sha256, and md5 if the list has it."""
        return ("sha256", "md5") if "expected_md5" in self._columns else ("sha256",)

    def urls(self) -> pa.Table:
        """The column `url`, empty for rows that are not fetched."""
        urls = self.table["url"].to_pylist()
        for row in self.skipped:
            urls[row] = ""
        return pa.table({"url": pa.array(urls, pa.string())})

    def metadata_json(self, row: int, outcome: RowOutcome, *, exif: bool) -> bytes:
        """The json member of a sample: img2dataset's keys, then `phash` in hexadecimal and `flags`."""
        given = {name: _json_value(column[row].as_py()) for name, column in self._columns.items()}
        known = {**vars(outcome), "phash": None if outcome.phash is None else f"{outcome.phash:016x}"}
        if not exif:
            del known["exif"]
        return json.dumps({**given, "key": self.key(row), **known}, allow_nan=False).encode()

    def write(self, parquet: Path, outcomes: Sequence[RowOutcome], *, exif: bool) -> None:
        """Write the outcome of each row, in the order of the rows. The same outcomes give the same bytes."""
        fields = [
            *self.table.schema,
            pa.field("key", pa.string()),
            *(field for field in _OUTCOME_FIELDS if exif or field.name != "exif"),
        ]
        columns = [*self.table.columns, pa.array([self.key(row) for row in range(len(self))], pa.string())]
        for field in fields[len(columns) :]:
            columns.append(pa.array([getattr(outcome, field.name) for outcome in outcomes], field.type))
        pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), parquet)


_OUTCOME_FIELDS = pa.schema(
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


def _clean(given: str) -> _Caption:
    size_bytes = len(given.encode())
    if size_bytes > MAX_CAPTION_BYTES:
        problem = f"caption_too_long: {size_bytes} bytes, more than {MAX_CAPTION_BYTES}"
        return _Caption(_CONTROL.sub(" ", given[:CUT_CAPTION_CHARS]), problem=problem)
    text = _CONTROL.sub(" ", given)
    return _Caption(text, text != given or _REPLACED in text, "" if text.strip() else "empty_caption: no caption")


def _valid(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """The column itself, or nulls if nested texts of it are not UTF-8, which no reader could load again."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return pa.nulls(len(column), column.type)
    return column


def _json_value(value: Any) -> Any:
    """The value with null in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _json_value(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_json_value(each) for each in value]
    return value
