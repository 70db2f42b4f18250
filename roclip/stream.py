"""Manifest to batches, in an order that is a pure function of (snapshot, seed, epoch).

An epoch is one pass over the manifest as it stood when the epoch began; shards published later join the next one.
The order does not depend on the number of ranks, so the whole state is (epoch, samples seen in it).

Letters: B local batch, G global batch = B x world size, L caption tokens, V streams.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from roclip.errors import DataError, ShardError
from roclip.order import EpochOrder
from roclip.reader import BadSampleError, Readers, decode
from roclip.shard_cache import ShardCache
from roclip.shards import Manifest, ShardRecord, digest


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    tokens: Tensor
    """(B, L) int64."""
    ids: Tensor
    """(B,) int64: the samples' numbers (`ShardReader.id`)."""
    valid: Tensor
    """(B,) bool: false where the sample could not be read; its pixels are zero and it must not enter the loss."""
    bad: tuple[tuple[str, str], ...]
    """(shard and key, reason) of the samples that could not be read."""

    def pin_memory(self) -> "Batch":
        """With its tensors in page-locked memory; torch's loader calls it before a GPU takes them."""
        images, tokens, ids, valid = (t.pin_memory() for t in (self.images, self.tokens, self.ids, self.valid))
        return Batch(images, tokens, ids, valid, self.bad)


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


class Stream:
    """Batches of this rank out of a folder of shards.

    Args:
        shards: Folder with the manifest.
        tokenize: Captions to tokens (B, L).
        image_size: S, side of the images in a batch, in pixels.
        global_batch_size: G. The last samples of an epoch that do not fill a global batch are left to the next one.
        workers: Processes that read ahead; 0 reads in this process.
        cache: Local copies of the shards, where `shards` is a store.
        edit: Changes a caption before it is tokenised: (caption, sample id, epoch) -> caption, a pure function.
        caption_key: Key of the json member that holds a sample's captions; empty reads its txt member.
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
        cache: ShardCache | None = None,
        edit: Callable[[str, int, int], str] | None = None,
        caption_key: str = "",
    ):
        self.shards, self.tokenize, self.image_size = shards, tokenize, image_size
        self.cache, self.edit, self.caption_key = cache, edit, caption_key
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
        order = EpochOrder(
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
        dataset = _Batches(self, snapshot.records, order, starts, rows, epoch)
        pin = torch.cuda.is_available()
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.workers, pin_memory=pin))


def choose(captions: Sequence[str], seed: int, epoch: int, sample_id: int) -> str:
    """One of a sample's captions: a pure function, the same on any rank and after a resume."""
    if len(captions) == 1:
        return captions[0]
    bits = np.random.Philox(
        key=[seed, epoch], counter=[0, 0, sample_id, 2]
    )  # images draw with a 0 there, edits with a 1
    return captions[int(np.random.Generator(bits).integers(len(captions)))]


class _Batches(Dataset):
    """Batch number -> Batch; a map-style dataset, so that the loader may read ahead in other processes."""

    def __init__(
        self,
        stream: Stream,
        records: tuple[ShardRecord, ...],
        order: EpochOrder,
        starts: Sequence[int],
        rows: int,
        epoch: int,
    ):
        self.stream, self.order, self.starts, self.rows, self.epoch = stream, order, starts, rows, epoch
        self.readers = Readers(stream.shards, records, stream.cache, stream.caption_key)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Batch:
        rows = self.order.at(self.starts[number] + np.arange(self.rows)).tolist()
        size = self.stream.image_size
        images = np.zeros((len(rows), size, size, 3), dtype=np.uint8)
        ids = torch.zeros(len(rows), dtype=torch.int64)
        valid = torch.ones(len(rows), dtype=torch.bool)
        captions: list[str] = [""] * len(rows)
        bad = []
        for row, (shard, sample) in enumerate(rows):
            reader = self.readers[shard]
            ids[row] = reader.id(sample)
            try:
                images[row] = decode(reader.image(sample), size)
                captions[row] = choose(reader.captions(sample), self.stream.seed, self.epoch, int(ids[row]))
                if self.stream.edit:
                    captions[row] = self.stream.edit(captions[row], int(ids[row]), self.epoch)
            except BadSampleError as error:
                valid[row] = False
                bad.append((f"{reader.record.name} {reader.key(sample)}", str(error)))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        return Batch(pixels, self.stream.tokenize(captions), ids, valid, tuple(bad))
