"""The pass over the sealed shards: every distinct image of a shard is shown once to the model and once to the oracle.

Each shard is looked at for itself (`scan_shard`), in batches that do not depend on any other, by whoever has time; the looks
are put together in the order of the manifest (`merge`). So it is the same to the bit who looked at what, and how many did.

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
from roclip.oracle.scan.look import scan_shard
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.scan.sequences import HexDigests, RaggedRows, SamplePlaces, Strings
from roclip.oracle.scan.shard_record import SavedScans, ShardScan, without_features
from roclip.oracle.segmenters.naming import name_labels
from roclip.oracle.statistics import Observations

MAX_SIDE_PX = 512
_MERGED = ("sha256", "seen", "clear", "areas", "top", "scores")


@dataclass(frozen=True)
class ScanResult:
    """What the pass found; `keys`, `captions` and `places` have one entry a caption, the rest one an image."""

    observations: Observations
    areas: np.ndarray
    """(N, C) float16: the oracle's area shares."""
    sha256: Sequence[str]
    """Of the original image's bytes where img2dataset noted it, else of the stored ones."""
    keys: Sequence[str]
    captions: Sequence[str]
    places: Sequence[tuple[str, int]]
    """Shard and sample number within it."""
    size_px: int
    """Side at which the images were looked at."""
    unreadable: int
    top: np.ndarray
    """(N, k) int32: the model's best labels, the best first."""
    scores: np.ndarray
    """(N, k) float32: cosine of the image and these labels."""
    forwards: int
    """Images that the model and the oracle saw each: those that two shards hold were seen twice."""
    _features: "_Features"

    def captions_of(self) -> Sequence[list[int]]:
        """For each image, its entries of `keys` and `captions`."""
        return RaggedRows(self.observations.image, len(self.areas))

    def features(self, images: np.ndarray | None = None) -> np.ndarray:
        """(k, D) float16, unit length: those of these images, or of all; read from where they lie."""
        return self._features(np.arange(len(self.areas)) if images is None else images)


def scan_shards(
    witness: Scorer, shards: Path, say: Progress, caption_key: str = "", saved: SavedScans | None = None
) -> ScanResult:
    """Look at every sealed shard that `saved` does not have yet, and put all together.

    Reads every usable sample once, with its first caption (`ShardReader`). Raises `DataError` where there is no shard.
    """
    records = sealed(shards)
    size_px = saved.size_px if saved else side_of(shards, caption_key)
    pace = Pace(sum(not (saved and saved.has(record)) for record in records), "shards looked at")

    def each() -> Iterator[tuple[ShardRecord, ShardScan]]:
        for record in records:
            scan_shards = saved.read(record) if saved else None
            if scan_shards is None:
                scan_shards = scan_shard(witness, shards, record, caption_key, size_px)
                if saved:
                    saved.write(record, scan_shards)
                    scan_shards = without_features(scan_shards)
                pace.say(say, 1, len(scan_shards.sha256))
            yield record, scan_shards

    capacity = sum(record.samples for record in records)
    return merge(each(), witness.labels, size_px, capacity, saved, witness.synonyms)


def sealed(shards: Path) -> tuple[ShardRecord, ...]:
    """The shards to look at. Raises `DataError` where there are none."""
    records = Manifest(shards).records()
    if not records:
        raise DataError(f"{shards}: expected sealed shards, got none. Run `roclip ingest` first.")
    return records


def side_of(shards: Path, caption_key: str = "") -> int:
    """Side at which to look: the longer one of the first image that can be read, whose size the others share."""
    for record in sealed(shards):
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
    looks: Iterable[tuple[ShardRecord, ShardScan]],
    labels: Sequence[str],
    size_px: int,
    capacity: int,
    saved: SavedScans | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> ScanResult:
    """Put shards together, in the order given. An image that several hold counts once, as the first has it; its captions
    collect.

    Args:
        capacity: At least as many images as there are: memory is taken for them when they come.
        saved: Where the looks' features lie, for looks that came without.
        synonyms: See `name_labels`.
    """
    records: list[ShardRecord] = []
    kept: list[np.ndarray | None] = []
    images, samples = _Rows(capacity), _Rows(capacity)
    keys, captions = [], []
    unreadable = 0
    for number, (record, scan_shards) in enumerate(looks):
        n = len(scan_shards.sha256)
        samples.add(
            image=scan_shards.image.astype(np.int64) + len(images),
            shard=np.full(len(scan_shards.sample), number, dtype=np.int32),
            sample=scan_shards.sample,
        )
        images.add(
            **{name: getattr(scan_shards, name) for name in _MERGED},
            shard=np.full(n, number, dtype=np.int32),
            row=np.arange(n, dtype=np.int32),
        )
        records.append(record)
        kept.append(scan_shards.features)
        keys.append(scan_shards.keys)
        captions.append(scan_shards.captions)
        unreadable += scan_shards.unreadable
    shown = len(images)
    first, number_of = _distinct(images["sha256"])
    if len(first) < shown:
        images.keep(first)
    image = number_of[samples["image"]]
    said = Strings(captions)
    observations = Observations(
        images["top"][:, 0], images["seen"], images["clear"], image, name_labels(said, labels, synonyms)
    )
    return ScanResult(
        observations,
        images["areas"],
        HexDigests(images["sha256"]),
        Strings(keys),
        said,
        SamplePlaces([record.name for record in records], samples["shard"], samples["sample"]),
        size_px,
        unreadable,
        top=images["top"],
        scores=images["scores"],
        forwards=shown,
        _features=_Features(images["shard"], images["row"], records, kept, saved),
    )


class Pace:
    """Says how far a pass is, how fast it goes and when it will have ended."""

    def __init__(self, total: int, what: str):
        self.total, self.what, self.done, self.images, self._started_s = total, what, 0, 0, time.monotonic()

    def say(self, say: Progress, done: int, images: int) -> None:
        """So many more are done, with so many images."""
        self.done, self.images = self.done + done, self.images + images
        seconds = max(time.monotonic() - self._started_s, 1e-9)
        left = seconds / self.done * (self.total - self.done)
        rate = f"{self.images:,} images  {self.images / seconds:,.0f} images/s"
        ends = f"  {left:.0f} s left" if self.done < self.total else ""
        say(self.done, self.total, f"{self.done} of {self.total} {self.what}  {rate}{ends}")


# ---- putting shards together --------------------------------------------------------------------------------


class _Rows:
    """Columns that grow by pieces, each in one array that the system gives memory for as it fills."""

    def __init__(self, capacity: int):
        self._capacity, self._used = capacity, 0
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self._used

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name][: self._used]

    def add(self, **pieces: np.ndarray) -> None:
        """Rows of all columns, the same each time."""
        end = self._used
        for name, piece in pieces.items():
            if name not in self._columns:
                self._columns[name] = np.empty((self._capacity, *piece.shape[1:]), dtype=piece.dtype)
            end = self._used + len(piece)
            self._columns[name][self._used : end] = piece
        self._used = end

    def keep(self, rows: np.ndarray) -> None:
        """Only these rows, ascending, moved down where they lie."""
        for column in self._columns.values():
            for start in range(0, len(rows), _MOVED):
                column[start : start + len(rows[start : start + _MOVED])] = column[rows[start : start + _MOVED]]
        self._used = len(rows)


_MOVED = 1 << 14


def _distinct(sha256: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, 32) uint8 to the rows that come first with theirs, ascending, and (R,) the place of each row's in that list."""
    words = np.ascontiguousarray(sha256).view(np.uint64)
    order = np.lexsort(words.T)  # stable: of equal ones the first row stays first
    ordered = words[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[new]
    by_row = np.argsort(first)
    place = np.empty(len(first), dtype=np.int64)
    place[by_row] = np.arange(len(first))
    number_of = np.empty(len(order), dtype=np.int64)
    number_of[order] = place[np.cumsum(new) - 1]
    return first[by_row], number_of


class _Features:
    """Features of images by their number, out of the looks that hold them."""

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
            here = shards == number
            features = self._of(int(number))[self._row[images[here]]]
            if result is None:
                result = np.empty((len(images), features.shape[1]), dtype=features.dtype)
            result[here] = features
        return np.empty((0, 0), dtype=np.float16) if result is None else result

    def _of(self, number: int) -> np.ndarray:
        kept = self._kept[number]
        if kept is not None:
            return kept
        assert self._saved is not None
        return self._saved.features(self._records[number])
