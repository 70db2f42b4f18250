"""What was seen in one shard, and the file that keeps it, so that a check that was cut off goes on.

A file is a parquet table with a row for each distinct image; its metadata say which model and oracle, which shard and which
side it is of: one of another is not used. It is written whole or not at all, and reading it runs no code.

Letters: n distinct images of a shard, m samples, C labels, D feature width, k best labels.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roclip.data.shards import ShardRecord
from roclip.errors import DataError
from roclip.storage import write_atomic

FORMAT = 2
_STAMP, _UNREADABLE = b"roclip.stamp", b"roclip.unreadable"
_OF_IMAGES = ("sha256", "seen", "clear", "areas", "top", "scores", "features")
_OF_SAMPLES = ("sample", "keys", "captions")


@dataclass(frozen=True)
class ShardScan:
    """Of one shard; images in the order in which they first appear in it, samples by image."""

    sha256: np.ndarray
    """(n, 32) uint8: of the original image's bytes where img2dataset noted it, else of the stored ones."""
    seen: np.ndarray
    """(n, C) bool: the oracle says that the label may be there."""
    clear: np.ndarray
    """(n, C) bool: the oracle says that it certainly is."""
    areas: np.ndarray
    """(n, C) float16: the oracle's area shares; `seen` and `clear` were told before they were rounded."""
    top: np.ndarray
    """(n, k) int32: the model's best labels, the best first; of equal ones the first."""
    scores: np.ndarray
    """(n, k) float32: cosine of the image and these labels."""
    features: np.ndarray | None
    """(n, D) float16, unit length; None where they were left in the file."""
    image: np.ndarray
    """(m,) int32: the image of a sample, ascending."""
    sample: np.ndarray
    """(m,) int32: its number within the shard."""
    keys: pa.Array
    """m of large_string."""
    captions: pa.Array
    """m of large_string."""
    unreadable: int
    """Samples that could not be read."""


@dataclass(frozen=True)
class SavedScans:
    """A folder with a file for each shard that was looked at."""

    folder: Path
    made_by: str
    """Of the witness (`roclip.oracle.scan.scorer.made_by`)."""
    caption_key: str
    size_px: int

    def path(self, record: ShardRecord) -> Path:
        return self.folder / f"{Path(record.name).stem}.parquet"

    def stamp(self, record: ShardRecord) -> bytes:
        """Names all that the look at this shard depends on."""
        parts = [FORMAT, self.made_by, record.name, record.sha256, record.index_sha256, self.caption_key, self.size_px]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest().encode()

    def has(self, record: ShardRecord) -> bool:
        """Whether the look at this shard, by this witness, is there."""
        with self._opened(record) as file:
            return file is not None

    def read(self, record: ShardRecord) -> ShardScan | None:
        """The look at a shard, without the features; None if it is not there, or one of something else."""
        with self._opened(record) as file:
            if file is None:
                return None
            try:
                table = file.read([name for name in file.schema_arrow.names if name != "features"])
                return _look(table, int(file.schema_arrow.metadata[_UNREADABLE]))
            except (OSError, ValueError):
                return None

    def features(self, record: ShardRecord) -> np.ndarray:
        """(n, D) float16 of a shard that was looked at. Raises `DataError` if the file is gone."""
        with self._opened(record) as file:
            if file is None:
                raise DataError(
                    f"{self.path(record)}: expected what was seen in {record.name}, got nothing, or what another check saw. "
                    "Run the oracle again."
                )
            return _matrix(file.read(["features"])["features"])

    def write(self, record: ShardRecord, look: ShardScan) -> None:
        table = _table(look)
        unreadable = str(look.unreadable).encode()
        table = table.replace_schema_metadata({_STAMP: self.stamp(record), _UNREADABLE: unreadable})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, use_dictionary=False, compression="zstd")
        write_atomic(self.path(record), buffer.getvalue().to_pybytes())

    @contextlib.contextmanager
    def _opened(self, record: ShardRecord) -> Iterator[pq.ParquetFile | None]:
        try:
            file = pq.ParquetFile(self.path(record))
        except (OSError, ValueError):
            yield None
            return
        with file:
            yield file if (file.schema_arrow.metadata or {}).get(_STAMP) == self.stamp(record) else None


def without_features(look: ShardScan) -> ShardScan:
    """As `SavedScans.read` gives it."""
    return replace(look, features=None)


def _table(look: ShardScan) -> pa.Table:
    columns = {name: _column(np.asarray(getattr(look, name))) for name in _OF_IMAGES}
    starts = pa.array(np.searchsorted(look.image, np.arange(len(look.sha256) + 1)), pa.int64())
    for name in _OF_SAMPLES:
        values = getattr(look, name)
        values = values if isinstance(values, pa.Array) else pa.array(values)
        columns[name] = pa.LargeListArray.from_arrays(starts, values)
    return pa.table(columns)


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    if values.dtype == bool:
        values = np.packbits(values, axis=1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _look(table: pa.Table, unreadable: int) -> ShardScan:
    table = table.combine_chunks()
    classes = table["areas"].type.list_size
    images = {name: _matrix(table[name]) for name in _OF_IMAGES if name != "features"}
    for name in ("seen", "clear"):
        images[name] = np.unpackbits(images[name], axis=1, count=classes).astype(bool)
    lists = {name: _whole(table[name]) for name in _OF_SAMPLES}
    lengths = np.diff(lists["sample"].offsets.to_numpy())
    samples = {name: each.flatten() for name, each in lists.items()}
    return ShardScan(
        **images,
        features=None,
        image=np.repeat(np.arange(len(table), dtype=np.int32), lengths),
        sample=samples["sample"].to_numpy(),
        keys=samples["keys"],
        captions=samples["captions"],
        unreadable=unreadable,
    )


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    width = column.type.list_size
    return _whole(column).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
