"""The scan of the sealed shards: model and oracle score every distinct image of a shard once.

Each shard is scanned on its own (`scan_shard`), in batches that depend on no other shard, and the results are merged in the
order of the manifest (`merge`). The result is therefore bitwise the same for any number of workers and any split of shards.

Letters: n distinct images and m samples of a shard; N distinct images and M samples (captions) of all; C labels.
"""

import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from roclip.data.reader import FORMATS, BadSampleError, ShardReader, decode
from roclip.data.shards import Manifest, ShardRecord
from roclip.errors import DataError
from roclip.metrics.registry import Progress
from roclip.oracle.scan.saved import SavedScans, ShardScan, without_features
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.scan.sequences import HexDigests, RaggedRows, SamplePlaces, Strings
from roclip.oracle.scan.shard import scan_shard
from roclip.oracle.segmenters.naming import name_labels
from roclip.oracle.statistics import Observations

MAX_SIDE_PX = 512
_MERGED = ("sha256", "seen", "clear", "areas", "top", "scores")


@dataclass(frozen=True)
class ScanResult:
    """The result of a scan; `keys`, `captions` and `places` have one entry per caption, all else one per distinct image."""

    observations: Observations
    areas: np.ndarray
    """(N, C) float16: the oracle's area shares."""
    sha256: Sequence[str]
    """Digest of the original image's bytes where img2dataset recorded it, else of the stored bytes."""
    keys: Sequence[str]
    captions: Sequence[str]
    places: Sequence[tuple[str, int]]
    """Shard name and sample number within it."""
    size_px: int
    """Side in pixels to which the images were resized."""
    unreadable: int
    top: np.ndarray
    """(N, k) int32: the model's best labels, the best first."""
    scores: np.ndarray
    """(N, k) float32: cosine of the image and these labels."""
    forwards: int
    """Forward passes of model and oracle each; an image that two shards hold was scored twice."""
    _features: "_Features"

    def caption_rows(self) -> Sequence[list[int]]:
        """For each image, the indices of its entries in `keys` and `captions`."""
        return RaggedRows(self.observations.image, len(self.areas))

    def features(self, images: np.ndarray | None = None) -> np.ndarray:
        """Return the unit-length features (k, D) float16 of these images, or of all, read from memory or the saved scans."""
        return self._features(np.arange(len(self.areas)) if images is None else images)


def scan_shards(
    scorer: Scorer, shards: Path, progress: Progress, caption_key: str = "", saved: SavedScans | None = None
) -> ScanResult:
    """Scan every sealed shard that `saved` does not hold yet, and merge the results.

    Reads every usable sample once, with its first caption (`ShardReader`). Raises `DataError` if there is no shard.
    """
    records = sealed_records(shards)
    size_px = saved.size_px if saved else scan_side_px(shards, caption_key)
    throughput = Throughput(sum(not (saved and saved.has(record)) for record in records), "shards scanned")

    def each() -> Iterator[tuple[ShardRecord, ShardScan]]:
        for record in records:
            shard_scan = saved.read(record) if saved else None
            if shard_scan is None:
                shard_scan = scan_shard(scorer, shards, record, caption_key, size_px)
                if saved:
                    saved.write(record, shard_scan)
                    shard_scan = without_features(shard_scan)
                throughput.add(progress, 1, len(shard_scan.sha256))
            yield record, shard_scan

    capacity = sum(record.samples for record in records)
    return merge(each(), scorer.labels, size_px, capacity, saved, scorer.synonyms)


def sealed_records(shards: Path) -> tuple[ShardRecord, ...]:
    """Return the records of the sealed shards. Raises `DataError` if there are none."""
    records = Manifest(shards).records()
    if not records:
        raise DataError(f"{shards}: expected sealed shards, got none. Run `roclip ingest` first.")
    return records


def scan_side_px(shards: Path, caption_key: str = "") -> int:
    """Return the side in pixels for a scan: the longer side of the first readable image, 16 to `MAX_SIDE_PX`."""
    for record in sealed_records(shards):
        reader = ShardReader(shards, record, caption_key=caption_key)
        for sample in range(len(reader.index["key"])):
            try:
                encoded = reader.image(sample)
                decode(encoded, 16)
            except BadSampleError:
                continue
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as first:
                return max(16, min(MAX_SIDE_PX, max(first.size)))
    return 16


def merge(
    shard_scans: Iterable[tuple[ShardRecord, ShardScan]],
    labels: Sequence[str],
    size_px: int,
    capacity: int,
    saved: SavedScans | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> ScanResult:
    """Merge the scans of shards, in the order given.

    An image that several shards hold counts once, with the scores of the first and the captions of all.

    Args:
        capacity: Upper bound of images and samples; memory is committed only as they arrive.
        saved: Holds the features of the scans that come without them.
        synonyms: Passed to `name_labels`.
    """
    records: list[ShardRecord] = []
    kept: list[np.ndarray | None] = []
    images, samples = _Rows(capacity), _Rows(capacity)
    keys, captions = [], []
    unreadable = 0
    for number, (record, shard_scan) in enumerate(shard_scans):
        n = len(shard_scan.sha256)
        samples.add(
            image=shard_scan.image.astype(np.int64) + len(images),
            shard=np.full(len(shard_scan.sample), number, dtype=np.int32),
            sample=shard_scan.sample,
        )
        images.add(
            **{name: getattr(shard_scan, name) for name in _MERGED},
            shard=np.full(n, number, dtype=np.int32),
            row=np.arange(n, dtype=np.int32),
        )
        records.append(record)
        kept.append(shard_scan.features)
        keys.append(shard_scan.keys)
        captions.append(shard_scan.captions)
        unreadable += shard_scan.unreadable
    shown = len(images)
    first, index_of = _distinct(images["sha256"])
    if len(first) < shown:
        images.keep(first)
    image = index_of[samples["image"]]
    all_captions = Strings(captions)
    observations = Observations(
        images["top"][:, 0], images["seen"], images["clear"], image, name_labels(all_captions, labels, synonyms)
    )
    return ScanResult(
        observations,
        images["areas"],
        HexDigests(images["sha256"]),
        Strings(keys),
        all_captions,
        SamplePlaces([record.name for record in records], samples["shard"], samples["sample"]),
        size_px,
        unreadable,
        top=images["top"],
        scores=images["scores"],
        forwards=shown,
        _features=_Features(images["shard"], images["row"], records, kept, saved),
    )


class Throughput:
    """Reports progress, images per second and the time left."""

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done, self.images, self._started_s = total, what, 0, 0, time.monotonic()

    def add(self, progress: Progress, done: int, images: int) -> None:
        """Count `done` more items with `images` images, and report through `progress`."""
        self.done, self.images = self.done + done, self.images + images
        seconds = max(time.monotonic() - self._started_s, 1e-9)
        left = seconds / self.done * (self.total - self.done)
        rate = f"{self.images:,} images  {self.images / seconds:,.0f} images/s"
        ends = f"  {left:.0f} s left" if self.done < self.total else ""
        progress(self.done, self.total, f"{self.done} of {self.total} {self.what}  {rate}{ends}")


# ---- merging shards -------------------------------------------------------------------------------------------


class _Rows:
    """Columns that grow by appending to one preallocated array each; the system commits its pages as they fill."""

    def __init__(self, capacity: int):
        self._capacity, self._used = capacity, 0
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][: self._used]

    def add(self, **pieces: np.ndarray) -> None:
        """Append rows; every call names the same columns."""
        end = self._used
        for name, piece in pieces.items():
            if name not in self._columns:
                self._columns[name] = np.empty((self._capacity, *piece.shape[1:]), dtype=piece.dtype)
            end = self._used + len(piece)
            self._columns[name][self._used : end] = piece
        self._used = end

    def keep(self, rows: np.ndarray) -> None:
        """Keep only these rows (ascending), moved in place."""
        for column in self._columns.values():
            for start in range(0, len(rows), _MOVED):
                column[start : start + len(rows[start : start + _MOVED])] = column[rows[start : start + _MOVED]]
        self._used = len(rows)


_MOVED = 1 << 14


def _distinct(sha256: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For digests (R, 32) uint8, return the rows where each first appears (ascending), and each row's index (R,) into them."""
    words = np.ascontiguousarray(sha256).view(np.uint64)
    order = np.lexsort(words.T)  # stable, so that the first of equal rows stays first
    ordered = words[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[new]
    by_row = np.argsort(first)
    place = np.empty(len(first), dtype=np.int64)
    place[by_row] = np.arange(len(first))
    index_of = np.empty(len(order), dtype=np.int64)
    index_of[order] = place[np.cumsum(new) - 1]
    return first[by_row], index_of


class _Features:
    """Reads the features of images by number, from memory or from the saved scans."""

    def __init__(
        self,
        shard: np.ndarray,
        row: np.ndarray,
        records: Sequence[ShardRecord],
        kept: Sequence[np.ndarray | None],
        saved: SavedScans | None,
    ):
        self._shard, self._row, self._records, self._kept, self._saved = shard, row, records, kept, saved

    def __call__(self, images: np.ndarray) -> np.ndarray:
        shards, result = self._shard[images], None
        for number in np.unique(shards):
            rows = shards == number
            features = self._of(int(number))[self._row[images[rows]]]
            if result is None:
                result = np.empty((len(images), features.shape[1]), dtype=features.dtype)
            result[rows] = features
        return np.empty((0, 0), dtype=np.float16) if result is None else result

    def _of(self, number: int) -> np.ndarray:
        kept = self._kept[number]
        if kept is not None:
            return kept
        assert self._saved is not None
        return self._saved.features(self._records[number])
