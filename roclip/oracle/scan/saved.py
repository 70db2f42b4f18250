"""The scan of one shard and the file that stores it, so that an interrupted check resumes.

A file is a parquet table with one row per distinct image. Its metadata hold a stamp of model, oracle, shard and image side;
a file with another stamp is ignored. It is written atomically, and reading it runs no code.

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
_IMAGE_COLUMNS = ("sha256", "seen", "clear", "areas", "top", "scores", "features")
_SAMPLE_COLUMNS = ("sample", "keys", "captions")


@dataclass(frozen=True)
class ShardScan:
    """The scan of one shard: images in order of first appearance, samples ordered by image."""

    sha256: np.ndarray
    """(n, 32) uint8: digest of the original image's bytes where img2dataset recorded it, else of the stored bytes."""
    seen: np.ndarray
    """(n, C) bool: the oracle finds the label possibly present."""
    clear: np.ndarray
    """(n, C) bool: the oracle finds the label certainly present."""
    areas: np.ndarray
    """(n, C) float16: the oracle's area shares; `seen` and `clear` were computed before this rounding."""
    top: np.ndarray
    """(n, k) int32: the model's best labels in descending order; ties go to the lower index."""
    scores: np.ndarray
    """(n, k) float32: cosine of the image with these labels."""
    features: np.ndarray | None
    """(n, D) float16, unit length; None if they were not loaded from the file."""
    image: np.ndarray
    """(m,) int32: image index of each sample, ascending."""
    sample: np.ndarray
    """(m,) int32: number of each sample within the shard."""
    keys: pa.Array
    """m large_string."""
    captions: pa.Array
    """m large_string."""
    unreadable: int
    """Samples that could not be read."""


@dataclass(frozen=True)
class SavedScans:
    """A folder with one file per scanned shard."""

    folder: Path
    scorer_fingerprint: str
    """Identifies the scorer: `roclip.oracle.scan.scorer.scorer_fingerprint`."""
    caption_key: str
    size_px: int

    def path(self, record: ShardRecord) -> Path:
        return self.folder / f"{Path(record.name).stem}.parquet"

    def stamp(self, record: ShardRecord) -> bytes:
        """Return the sha256 (hex) of everything that the scan of this shard depends on."""
        parts = [
            FORMAT,
            self.scorer_fingerprint,
            record.name,
            record.sha256,
            record.index_sha256,
            self.caption_key,
            self.size_px,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest().encode()

    def has(self, record: ShardRecord) -> bool:
        """Whether the scan of this shard by this scorer is stored."""
        with self._opened(record) as file:
            return file is not None

    def read(self, record: ShardRecord) -> ShardScan | None:
        """Return the scan of a shard without its features, or None if it is missing, broken or has another stamp."""
        with self._opened(record) as file:
            if file is None:
                return None
            try:
                table = file.read([name for name in file.schema_arrow.names if name != "features"])
                return _from_table(table, int(file.schema_arrow.metadata[_UNREADABLE]))
            except (OSError, ValueError):
                return None

    def features(self, record: ShardRecord) -> np.ndarray:
        """Return the features (n, D) float16 of a scanned shard. Raises `DataError` if the file is gone."""
        with self._opened(record) as file:
            if file is None:
                raise DataError(
                    f"{self.path(record)}: expected the saved scan of {record.name}, got no file or one of another check. "
                    "Run the oracle again."
                )
            return _matrix(file.read(["features"])["features"])

    def write(self, record: ShardRecord, shard_scan: ShardScan) -> None:
        table = _to_table(shard_scan)
        unreadable = str(shard_scan.unreadable).encode()
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


def without_features(shard_scan: ShardScan) -> ShardScan:
    """Return the scan as `SavedScans.read` does: `features` is None."""
    return replace(shard_scan, features=None)


def _to_table(shard_scan: ShardScan) -> pa.Table:
    columns = {name: _column(np.asarray(getattr(shard_scan, name))) for name in _IMAGE_COLUMNS}
    starts = pa.array(np.searchsorted(shard_scan.image, np.arange(len(shard_scan.sha256) + 1)), pa.int64())
    for name in _SAMPLE_COLUMNS:
        values = getattr(shard_scan, name)
        values = values if isinstance(values, pa.Array) else pa.array(values)
        columns[name] = pa.LargeListArray.from_arrays(starts, values)
    return pa.table(columns)


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    if values.dtype == bool:
        values = np.packbits(values, axis=1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _from_table(table: pa.Table, unreadable: int) -> ShardScan:
    table = table.combine_chunks()
    classes = table["areas"].type.list_size
    images = {name: _matrix(table[name]) for name in _IMAGE_COLUMNS if name != "features"}
    for name in ("seen", "clear"):
        images[name] = np.unpackbits(images[name], axis=1, count=classes).astype(bool)
    lists = {name: _whole(table[name]) for name in _SAMPLE_COLUMNS}
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
