"""Manifest to batches, in an order that is a pure function of (snapshot, seed, epoch).

An epoch is one pass over the manifest as it stood when the epoch began; shards published later join the next one.
The order does not depend on the number of ranks, so the whole state is (epoch, samples seen in it).

Letters: B local batch, G global batch = B x world size, L caption tokens, V streams, N samples of the snapshot.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from roclip.errors import DataError, ShardError
from roclip.shards import Manifest, ShardRecord, digest, index_path

MAX_PIXELS = 89_478_485
"""An image with more is refused before it is decoded (Pillow's own bound)."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    tokens: Tensor
    """(B, L) int64."""
    ids: Tensor
    """(B,) int64: the sample keys as numbers."""
    valid: Tensor
    """(B,) bool: false where the sample could not be read; its pixels are zero and it must not enter the loss."""
    bad: tuple[tuple[str, str], ...]
    """(shard and key, reason) of the samples that could not be read."""


@dataclass(frozen=True)
class Snapshot:
    """The shards of an epoch."""

    records: tuple[ShardRecord, ...]

    @property
    def samples(self) -> int:
        return sum(record.samples for record in self.records)

    @property
    def digest(self) -> str:
        return digest(self.records)

    @property
    def names(self) -> list[str]:
        return [record.name for record in self.records]


def take_snapshot(manifest: Manifest, names: Sequence[str] | None = None) -> Snapshot:
    """The manifest as it stands, or only the shards that an earlier snapshot named.

    Raises `ShardError` when a named shard is not in the manifest any more.
    """
    records = {record.name: record for record in manifest.records()}
    if names is None:
        return Snapshot(tuple(records.values()))
    missing = [name for name in names if name not in records]
    if missing:
        raise ShardError(
            f"{manifest.folder}: expected the shards of the recorded snapshot, {', '.join(missing)} not there. "
            "Bring them back, or start a new run."
        )
    return Snapshot(tuple(records[name] for name in names))


def wait_for_shards(manifest: Manifest, min_shards: int, wait_s: float) -> None:
    """Return when the manifest names `min_shards` shards, or when ingest has ended with at least one.

    Raises `DataError` after `wait_s` seconds, or when ingest ended without any shard.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found, ended = len(manifest.records()), manifest.summary is not None
        if found >= min_shards or (ended and found):
            return
        if ended or time.monotonic() > deadline:
            raise DataError(
                f"{manifest.folder}: expected {min_shards} sealed shards within {wait_s:.0f} s, got {found}. "
                "Look at the ingest stage's failures; `roclip ingest` runs it alone."
            )
        time.sleep(0.2)


def epoch_order(
    samples: Sequence[int], *, seed: int, epoch: int, streams: int, shuffle_buffer: int, run_length: int
) -> np.ndarray:
    """The order of one epoch: (N, 2) int64 rows of (shard number, sample number), every sample exactly once.

    Shards are permuted and dealt to `streams` virtual streams; each stream shuffles its samples within consecutive
    buffers of `shuffle_buffer`; then the streams take turns, `run_length` samples a turn, until all are empty.

    Args:
        samples: Samples of each shard of the snapshot, in its order.
        run_length: ceil(G / V), so that the rows of one rank come from few streams.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    dealt = generator.permutation(len(samples))
    keys, rows = [], []
    for stream in range(min(streams, len(samples))):
        shards = dealt[stream::streams]
        numbers = np.array([samples[shard] for shard in shards])
        order = np.stack(
            [np.repeat(shards, numbers), np.concatenate([np.arange(number) for number in numbers])], axis=1
        )
        for start in range(0, len(order), shuffle_buffer):
            order[start : start + shuffle_buffer] = generator.permutation(order[start : start + shuffle_buffer])
        position = np.arange(len(order))
        rows.append(order)
        keys.append(np.stack([position // run_length, np.full(len(order), stream), position]))
    if not rows:
        return np.empty((0, 2), dtype=np.int64)
    turn, stream, position = np.concatenate(keys, axis=1)
    return np.concatenate(rows)[np.lexsort((position, stream, turn))].astype(np.int64)


class Stream:
    """Batches of this rank out of a folder of shards.

    Args:
        shards: Folder with the manifest.
        tokenize: Captions to tokens (B, L).
        image_size: S, side of the images in a batch, in pixels.
        global_batch_size: G. The last samples of an epoch that do not fill a global batch are left to the next one.
        workers: Processes that read ahead; 0 reads in this process.
        edit: Changes a caption before it is tokenised: (caption, sample id, epoch) -> caption, a pure function.
    """

    def __init__(
        self,
        shards: Path,
        *,
        tokenize: Callable[[Sequence[str]], Tensor],
        image_size: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        streams: int,
        shuffle_buffer: int,
        workers: int = 0,
        edit: Callable[[str, int, int], str] | None = None,
    ):
        self.shards, self.tokenize, self.image_size, self.edit = shards, tokenize, image_size, edit
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.seed, self.streams, self.shuffle_buffer, self.workers = seed, streams, shuffle_buffer, workers

    def steps(self, snapshot: Snapshot) -> int:
        """Steps of an epoch over this snapshot. Raises `DataError` when there is not even one."""
        if snapshot.samples < self.global_batch_size:
            raise DataError(
                f"{self.shards}: expected at least a global batch of {self.global_batch_size} samples, the manifest "
                f"has {snapshot.samples}. Raise data.min_shards or lower train.global_batch_size."
            )
        return snapshot.samples // self.global_batch_size

    def epoch(self, snapshot: Snapshot, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` (counted from 0) on. A resume reads nothing that was seen."""
        order = epoch_order(
            [record.samples for record in snapshot.records],
            seed=self.seed,
            epoch=epoch,
            streams=self.streams,
            shuffle_buffer=self.shuffle_buffer,
            run_length=math.ceil(self.global_batch_size / self.streams),
        )
        rows = self.global_batch_size // self.world_size
        starts = range(
            first_step * self.global_batch_size + self.rank * rows,
            self.steps(snapshot) * self.global_batch_size,
            self.global_batch_size,
        )
        plan = [order[start : start + rows] for start in starts]
        dataset = _Batches(self.shards, snapshot.records, plan, self.tokenize, self.image_size, self.edit, epoch)
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.workers))


class _Batches(Dataset):
    """Batch number -> Batch; a map-style dataset, so that the loader may read ahead in other processes."""

    def __init__(
        self,
        shards: Path,
        records: tuple[ShardRecord, ...],
        plan: list[np.ndarray],
        tokenize: Callable[[Sequence[str]], Tensor],
        image_size: int,
        edit: Callable[[str, int, int], str] | None,
        epoch: int,
    ):
        self.readers = [ShardReader(shards, record) for record in records]
        self.plan, self.tokenize, self.image_size = plan, tokenize, image_size
        self.edit, self.epoch = edit, epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Batch:
        rows = self.plan[number]
        images = np.zeros((len(rows), self.image_size, self.image_size, 3), dtype=np.uint8)
        ids = torch.zeros(len(rows), dtype=torch.int64)
        valid = torch.ones(len(rows), dtype=torch.bool)
        captions: list[str] = [""] * len(rows)
        bad = []
        for row, (shard, sample) in enumerate(rows):
            reader = self.readers[shard]
            ids[row] = int(reader.key(sample))
            try:
                encoded, captions[row] = reader.read(sample)
                images[row] = decode(encoded, self.image_size)
                if self.edit:
                    captions[row] = self.edit(captions[row], int(ids[row]), self.epoch)
            except BadSampleError as error:
                valid[row] = False
                bad.append((f"{reader.record.name} {reader.key(sample)}", str(error)))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pixels, self.tokenize(captions), ids, valid, tuple(bad))


class BadSampleError(DataError):
    """One sample cannot be read; the message is the reason under which it is counted."""


class ShardReader:
    """Random access to the samples of one sealed shard through its index."""

    def __init__(self, root: Path, record: ShardRecord):
        self.root, self.record = root, record
        self._index: dict[str, list] | None = None
        self._file: io.BufferedReader | None = None

    @property
    def index(self) -> dict[str, list]:
        """Columns key, image_offset, image_size, caption_offset, caption_size."""
        if self._index is not None:
            return self._index
        path = index_path(self.root, self.record.name)
        try:
            self._index = index = pq.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the shard's index cannot be read ({error}). Run ingest again.") from error
        return index

    def key(self, sample: int) -> str:
        return self.index["key"][sample]

    def read(self, sample: int) -> tuple[bytes, str]:
        """Encoded image and caption. Raises `BadSampleError`."""
        image = self._bytes(self.index["image_offset"][sample], self.index["image_size"][sample])
        text = self._bytes(self.index["caption_offset"][sample], self.index["caption_size"][sample])
        try:
            caption = text.decode().strip()
        except UnicodeDecodeError as error:
            raise BadSampleError("caption_not_utf8") from error
        if not caption:
            raise BadSampleError("empty_caption")
        return image, caption

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = (self.root / self.record.name).open("rb")
            self._file.seek(offset)
            piece = self._file.read(size)
        except OSError as error:
            raise BadSampleError("shard_not_readable") from error
        if len(piece) < size:
            raise BadSampleError("truncated_tar")
        return piece

    def __del__(self):
        self.close()


def decode(encoded: bytes, size: int) -> np.ndarray:
    """An encoded image to (size, size, 3) uint8, resized if it is of another size. Raises `BadSampleError`."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError("too_many_pixels")
            image = image.convert("RGB")
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable_image") from error
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels") from error
