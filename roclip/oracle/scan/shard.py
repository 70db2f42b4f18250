"""The scan of one shard: the scores of model and oracle for its distinct images.

Letters: n distinct images that could be decoded, m samples, b images of a batch, C labels, D feature width.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roclip.data.reader import BadSampleError, ShardReader, decode
from roclip.data.shards import ShardRecord
from roclip.oracle.scan.saved import ShardScan
from roclip.oracle.scan.scorer import BATCH, Scorer, map_in_threads
from roclip.storage import content_of

TOP = 5
"""How many of the best labels of an image keep their scores."""
_SHA256 = re.compile("[0-9a-f]{64}")


def scan_shard(scorer: Scorer, shards: Path, record: ShardRecord, caption_key: str, size_px: int) -> ShardScan:
    """Score each distinct image of one shard once, resized to `size_px`.

    Samples that cannot be read are counted, not raised. Raises `ShardError` for a shard without an index.
    """
    samples = _Samples(shards, record, caption_key)
    seen = list(map_in_threads(lambda encoded: _scan_batch(scorer, encoded, size_px), samples.images()))
    readable = np.concatenate([each.readable for each in seen]) if seen else np.empty(0, dtype=bool)
    columns = {
        name: np.concatenate([getattr(each, name) for each in seen or [_empty_batch(scorer)]]) for name in _COLUMNS
    }
    place = np.cumsum(readable) - 1  # index among the decodable images
    image = np.array(samples.image, dtype=np.int64)
    rows = np.flatnonzero(readable[image])
    rows = rows[np.argsort(image[rows], kind="stable")]
    image = place[image[rows]].astype(np.int32)
    features = columns.pop("features")
    digests = np.array(samples.sha256, dtype="V32").view(np.uint8).reshape(-1, 32)
    return ShardScan(
        **columns,
        sha256=digests[readable],
        features=features.astype(np.float16),
        image=image,
        sample=np.array(samples.sample, dtype=np.int32)[rows],
        keys=pa.array([samples.keys[row] for row in rows], pa.large_string()),
        captions=pa.array([samples.captions[row] for row in rows], pa.large_string()),
        unreadable=samples.unreadable + len(samples.image) - len(rows),
    )


class _Samples:
    """Columns of a shard's samples, filled while `images` is iterated. `image` is the index of a sample's distinct image."""

    def __init__(self, shards: Path, record: ShardRecord, caption_key: str):
        self._reader = ShardReader(shards, record, caption_key=caption_key)
        self._originals = _originals(shards, record)
        self._numbers: dict[bytes, int] = {}
        self.image: list[int] = []
        self.sample: list[int] = []
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.unreadable = 0

    @property
    def sha256(self) -> list[bytes]:
        """Digests of the distinct images, in order of first appearance."""
        return list(self._numbers)

    def images(self) -> Iterator[list[bytes]]:
        """Yield the encoded bytes of the distinct images, `BATCH` at a time."""
        batch: list[bytes] = []
        for sample in range(len(self._reader.index["key"])):
            try:
                encoded, caption = self._reader.read(sample)
            except BadSampleError:
                self.unreadable += 1
                continue
            if self._is_new(sample, encoded, caption):
                batch.append(encoded)
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch
        self._reader.close()

    def _is_new(self, sample: int, encoded: bytes, caption: str) -> bool:
        key = self._reader.key(sample)
        sha256 = self._originals.get(key) or hashlib.sha256(encoded).digest()
        known = len(self._numbers)
        self.image.append(self._numbers.setdefault(sha256, known))
        self.sample.append(sample)
        self.keys.append(key)
        self.captions.append(caption)
        return len(self._numbers) > known


@dataclass(frozen=True)
class _BatchScan:
    """Which of the b images of a batch could be decoded, and the columns of `ShardScan` for those."""

    readable: np.ndarray
    features: np.ndarray
    """float32"""
    seen: np.ndarray
    clear: np.ndarray
    areas: np.ndarray
    top: np.ndarray
    scores: np.ndarray


_COLUMNS = ("features", "seen", "clear", "areas", "top", "scores")


def _scan_batch(scorer: Scorer, encoded: Sequence[bytes], size_px: int) -> _BatchScan:
    pixels = [_pixels(each, size_px) for each in encoded]
    decoded = [each for each in pixels if each is not None]
    readable = np.array([each is not None for each in pixels], dtype=bool)
    if not decoded:
        return _empty_batch(scorer, readable)
    scores = scorer.score_batch(np.stack(decoded))
    seen, clear = scorer.seen_and_clear(scores.areas)
    top = np.argsort(-scores.scores, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    return _BatchScan(
        readable=readable,
        features=scores.features,
        seen=seen,
        clear=clear,
        areas=scores.areas.astype(np.float16),
        top=top,
        scores=np.take_along_axis(scores.scores, top, axis=1),
    )


def _empty_batch(scorer: Scorer, readable: np.ndarray | None = None) -> _BatchScan:
    labels, width = len(scorer.labels), scorer.width
    none, few = np.empty((0, labels), dtype=bool), min(TOP, labels)
    return _BatchScan(
        readable=np.empty(0, dtype=bool) if readable is None else readable,
        features=np.empty((0, width), dtype=np.float32),
        seen=none,
        clear=none,
        areas=none.astype(np.float16),
        top=np.empty((0, few), dtype=np.int32),
        scores=np.empty((0, few), dtype=np.float32),
    )


def _pixels(encoded: bytes, size_px: int) -> np.ndarray | None:
    try:
        return decode(encoded, size_px)
    except BadSampleError:
        return None


def _originals(shards: Path, record: ShardRecord) -> dict[str, bytes]:
    """Map keys to the sha256 of the downloaded bytes, where img2dataset recorded it."""
    try:
        file = pq.ParquetFile(pa.BufferReader(content_of(shards / f"{Path(record.name).stem}.parquet")))
    except FileNotFoundError:
        return {}
    if not {"key", "sha256"} <= set(file.schema_arrow.names):
        return {}
    table = file.read(["key", "sha256"])
    pairs = zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True)
    return {key: bytes.fromhex(sha) for key, sha in pairs if sha and _SHA256.fullmatch(sha)}
