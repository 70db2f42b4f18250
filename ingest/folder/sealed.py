"""Reads the parquets of sealed shards, batch by batch, and writes parquets atomically: shared by all signals."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from roclip.data.shards import ShardRecord, read_index
from roclip.errors import ShardError
from roclip.storage import content_of, place, put

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
COLUMNS = {
    "key": pa.string(),
    "url": pa.string(),
    "caption": pa.string(),
    "status": pa.string(),
    "error_message": pa.string(),
    "sha256": pa.string(),
    "phash": pa.uint64(),
    "flags": pa.string(),
}
"""The columns that can be read; one that a parquet does not have is null."""
MAX_TEXT_CHARS = 2048
"""Longer texts are cut: training reads no more of a caption either."""
_BATCH_ROWS = 512
"""Rows read at once; small, because long texts are cut only after reading."""


def rows(root: Path, record: ShardRecord, columns: Sequence[str]) -> pa.Table:
    """Read every row of a shard's parquet: the columns, with null as "" or 0, and `sample`, whether it is in the shard's index.

    Raises `ShardError` for a parquet or index that cannot be read.
    """
    path = root / f"{Path(record.name).stem}.parquet"
    schema = pa.schema([(name, COLUMNS[name]) for name in dict.fromkeys(("key", *columns))])
    usable = read_index(root, record.name, ["key"])["key"].combine_chunks()
    try:
        file = pq.ParquetFile(path if isinstance(path, Path) else pa.BufferReader(content_of(path)))
        with file:
            there = [name for name in schema.names if name in file.schema_arrow.names]
            batches = [_clean(batch, schema) for batch in file.iter_batches(_BATCH_ROWS, columns=there)]
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: the shard's parquet cannot be read ({error}). Run ingest again.") from error
    table = pa.Table.from_batches(batches, schema=schema).combine_chunks()
    return table.append_column("sample", pc.is_in(table["key"], value_set=usable.cast(pa.string())))


def samples(root: Path, records: Sequence[ShardRecord], columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The samples of each shard, with the shard's position among the records: `key` and the columns, as in `rows`."""
    for shard, record in enumerate(records):
        table = rows(root, record, columns)
        yield shard, table.filter(table["sample"]).drop(["sample"]).combine_chunks()


def key_numbers(record: ShardRecord, keys: pa.ChunkedArray) -> np.ndarray:
    """Keys as numbers, uint64. Raises `ShardError` for keys that are not numbers."""
    try:
        return keys.cast(pa.uint64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise ShardError(
            f"{record.name}: expected the keys of ingest, which are numbers, got others ({error})."
        ) from error


class Keys:
    """The shards' names and the width of their keys, to format numbers as keys again."""

    def __init__(self, records: Sequence[ShardRecord]):
        self.names = pa.array([record.name for record in records], pa.string())
        self._width = np.zeros(len(records), np.int64)

    def record_width(self, shard: int, keys: pa.ChunkedArray) -> None:
        """Record the width of a shard's keys, which is the same for all of them."""
        self._width[shard] = len(keys[0].as_py()) if len(keys) else 0

    def text(self, shards: np.ndarray, keys: np.ndarray) -> pa.Array:
        """The keys as in tar and index."""
        digits = pa.array(keys.astype(np.uint64)).cast(pa.string())
        widths = self._width[shards]
        for width in np.unique(widths).tolist():
            digits = pc.if_else(pa.array(widths == width), pc.utf8_lpad(digits, int(width), "0"), digits)
        return digits


@contextmanager
def scratch(work: Path) -> Iterator[Path]:
    """A temporary folder on this machine: in `work`, or in the system's folder for temporary files if `work` is on a store."""
    local = isinstance(work, Path)
    if local:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".roclip-", dir=work if local else None) as folder:
        yield Path(folder)


@contextmanager
def parquet_writer(target: Path, schema: pa.Schema, folder: Path) -> Iterator[pq.ParquetWriter]:
    """Write a parquet under `folder` and, if the block succeeds, move it atomically to its target, local or on a store."""
    temporary = folder / f"{target.name}.part"
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield writer
    target = place(target)
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
    else:
        put(temporary, target)


def _clean(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    arrays = [_column(batch, field) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    if field.name not in batch.schema.names:
        return _filled(pa.nulls(len(batch), field.type))
    array = batch.column(field.name)
    if pa.types.is_list(array.type):
        array = pc.binary_join(array, ",")
    if not pa.types.is_string(field.type):
        return _filled(array.cast(field.type))
    return pc.utf8_slice_codeunits(_filled(_utf8(array.cast(pa.string()))), 0, MAX_TEXT_CHARS)


def _utf8(array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        texts = array.cast(pa.binary()).to_pylist()
        return pa.array([text and text.decode(errors="replace") for text in texts], pa.string())
    return array


def _filled(array: pa.Array) -> pa.Array:
    return pc.fill_null(array, "" if pa.types.is_string(array.type) else 0)
