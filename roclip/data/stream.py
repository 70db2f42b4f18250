"""Manifest to batches, in an order that is a pure function of (snapshot, seed, epoch).

An epoch is one pass over the manifest as it stood when the epoch began; shards published later join the next one.
The order does not depend on the number of ranks, so the whole state is (epoch, samples seen in it).

Letters: B local batch, G global batch, L caption tokens, V streams, T visits to shards.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from roclip.data.cache import ShardCache
from roclip.data.order import EpochOrder, visits
from roclip.data.reader import BadSampleError, Readers, decode
from roclip.data.shards import Manifest, ShardRecord, digest
from roclip.errors import DataError, ShardError


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
    """(B,) bool: false where the sample could not be read, its pixels then being zero, and in rows beyond the global
    batch: they must not enter the loss."""
    bad: tuple[tuple[str, str], ...]
    """(shard and key, reason) of the samples that could not be read."""
    cache_hits: int = 0
    """Shards that were opened for this batch and lay in the cache."""
    cache_misses: int = 0
    """Those that had to be fetched."""
    edited: Tensor | None = None
    """(B, L) int64: tokens of a second view of the captions, where the stream makes one."""

    def pin_memory(self) -> "Batch":
        """With its tensors in page-locked memory; torch's loader calls it before a GPU takes them."""
        images, tokens, ids, valid = (t.pin_memory() for t in (self.images, self.tokens, self.ids, self.valid))
        edited = None if self.edited is None else self.edited.pin_memory()
        return replace(self, images=images, tokens=tokens, ids=ids, valid=valid, edited=edited)


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


def wait_for_shards(manifest: Manifest, min_shards: int, wait_s: float, names: Sequence[str] = ()) -> None:
    """Return when the manifest names `min_shards` shards and those of a recorded snapshot, or when ingest has ended with at
    least one.

    Raises `DataError` after `wait_s` seconds, or when ingest ended without any shard.
    """
    deadline = time.monotonic() + wait_s
    while True:
        there, ended = {record.name for record in manifest.records()}, manifest.summary is not None
        found = len(there)
        if (found >= min_shards and there.issuperset(names)) or (ended and found):
            return
        if ended or time.monotonic() > deadline:
            raise DataError(
                f"{manifest.folder}: expected {max(min_shards, len(names))} sealed shards within {wait_s:.0f} s, got {found}. "
                "Look at the ingest stage's failures; `roclip ingest` runs it alone."
            )
        time.sleep(0.2)


class Stream:
    """Batches of this rank out of a folder of shards.

    Each rank has B = ceil(G / world size) rows, a multiple of `pieces`. Rows beyond the global batch, or beyond the epoch,
    hold some other sample and are not valid, so that they change no loss.

    Args:
        shards: Folder with the manifest.
        tokenize: Captions to tokens (B, L).
        image_size: S, side of the images in a batch, in pixels.
        global_batch_size: G.
        last_batch: The samples at an epoch's end that do not fill a global batch: `drop` leaves them to another epoch, `pad`
            gives them a step of their own.
        weights: How often an epoch reads the samples of a source, by its name; 1 where it has none. See `order.visits`.
        resampled: Draw an epoch's shards with replacement.
        pieces: Into which a rank's rows must divide.
        workers: Processes that read ahead; 0 reads in this process.
        cache: Local copies of the shards, where `shards` is a store.
        edit: Changes a caption before it is tokenised: (caption, sample id, epoch) -> caption, a pure function.
        second_edit: Makes of a caption, as `edit` left it, a second view: `Batch.edited`.
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
        last_batch: Literal["drop", "pad"] = "drop",
        weights: Mapping[str, float] | None = None,
        resampled: bool = False,
        pieces: int = 1,
        workers: int = 0,
        cache: ShardCache | None = None,
        edit: Callable[[str, int, int], str] | None = None,
        second_edit: Callable[[str, int, int], str] | None = None,
        caption_key: str = "",
    ):
        self.shards, self.tokenize, self.image_size = shards, tokenize, image_size
        self.cache, self.edit, self.second_edit, self.caption_key = cache, edit, second_edit, caption_key
        self.global_batch_size, self.rank, self.last_batch = global_batch_size, rank, last_batch
        self.rows = rows_of_rank(global_batch_size, world_size, pieces)
        self.weights, self.resampled = weights or {}, resampled
        self.seed, self.streams, self.shuffle_buffer, self.workers = seed, streams, shuffle_buffer, workers

    def plan(self, snapshot: Snapshot, epoch: int) -> "EpochPlan":
        """What an epoch over this snapshot reads, and when. Raises `DataError` when it has not even one step."""
        shards = visits(
            [record.source for record in snapshot.records],
            self.weights,
            seed=self.seed,
            epoch=epoch,
            resampled=self.resampled,
        )
        order = EpochOrder(
            [snapshot.records[shard].samples for shard in shards],
            seed=self.seed,
            epoch=epoch,
            streams=self.streams,
            shuffle_buffer=self.shuffle_buffer,
            run_length=math.ceil(self.global_batch_size / self.streams),
        )
        batch = self.global_batch_size
        steps = -(-len(order) // batch) if self.last_batch == "pad" else len(order) // batch
        if not steps:
            raise DataError(
                f"{self.shards}: expected at least a global batch of {batch} samples, epoch {epoch} has {len(order)}. "
                "Raise data.min_shards, lower train.global_batch_size or set data.last_batch=pad."
            )
        return EpochPlan(snapshot, epoch, shards, order, batch, steps)

    def epoch(self, snapshot: Snapshot, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of `plan(snapshot, epoch)`."""
        return self.batches(self.plan(snapshot, epoch), first_step)

    def batches(self, plan: "EpochPlan", first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` (counted from 0) on. A resume reads nothing that was seen."""
        dataset = _Batches(self, plan, range(first_step, plan.steps))
        pin = torch.cuda.is_available()
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.workers, pin_memory=pin))

    def where(self, plan: "EpochPlan", step: int) -> list[str]:
        """Shard and key of each sample of a whole global batch, `step` counted from 0: names for people."""
        readers = Readers(self.shards, plan.snapshot.records)
        places = plan.samples_at(np.arange(step * plan.batch, min((step + 1) * plan.batch, plan.samples)))
        return [f"{readers[shard].record.name} {readers[shard].key(sample)}" for shard, sample in places.tolist()]


def rows_of_rank(global_batch_size: int, world_size: int, pieces: int = 1) -> int:
    """B, the rows of each rank: enough for the global batch, and a multiple of `pieces`."""
    return -(-global_batch_size // (world_size * pieces)) * pieces


@dataclass(frozen=True)
class EpochPlan:
    """An epoch before it begins: how many steps it has, and which samples stand at each."""

    snapshot: Snapshot
    epoch: int
    shards: np.ndarray
    """(T,) numbers of the snapshot's shards, one a visit."""
    order: EpochOrder
    """Of the visits."""
    batch: int
    """G."""
    steps: int

    @property
    def samples(self) -> int:
        """That enter a step of the epoch."""
        return min(len(self.order), self.steps * self.batch)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """(n,) positions in the epoch to (n, 2) rows of (number of the shard in the snapshot, sample)."""
        places = self.order.at(positions)
        places[:, 0] = self.shards[places[:, 0]]
        return places


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

    def __init__(self, stream: Stream, plan: EpochPlan, steps: range):
        self.stream, self.plan, self.steps = stream, plan, steps
        self.readers = Readers(stream.shards, plan.snapshot.records, stream.cache, stream.caption_key)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Batch:
        stream, plan, step = self.stream, self.plan, self.steps[number]
        positions = step * plan.batch + stream.rank * stream.rows + np.arange(stream.rows)
        inside = positions < min((step + 1) * plan.batch, plan.samples)
        rows = plan.samples_at(np.where(inside, positions, positions % len(plan.order))).tolist()
        size, cached = stream.image_size, _counts(stream.cache)
        images = np.zeros((len(rows), size, size, 3), dtype=np.uint8)
        ids = torch.zeros(len(rows), dtype=torch.int64)
        valid = torch.from_numpy(inside)
        captions: list[str] = [""] * len(rows)
        bad = []
        for row, (shard, sample) in enumerate(rows):
            reader = self.readers[shard]
            ids[row] = reader.id(sample)
            try:
                images[row] = decode(reader.image(sample), size)
                captions[row] = choose(reader.captions(sample), stream.seed, plan.epoch, int(ids[row]))
                if stream.edit:
                    captions[row] = stream.edit(captions[row], int(ids[row]), plan.epoch)
            except BadSampleError as error:
                if inside[row]:
                    bad.append((f"{reader.record.name} {reader.key(sample)}", str(error)))
                valid[row] = False
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        hits, misses = (now - before for now, before in zip(_counts(stream.cache), cached, strict=True))
        edited = None
        if stream.second_edit:
            views = zip(captions, ids.tolist(), strict=True)
            edited = stream.tokenize([stream.second_edit(caption, i, plan.epoch) for caption, i in views])
        return Batch(pixels, stream.tokenize(captions), ids, valid, tuple(bad), hits, misses, edited)


def _counts(cache: ShardCache | None) -> tuple[int, int]:
    return (cache.hits, cache.misses) if cache else (0, 0)
