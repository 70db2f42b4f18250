"""Manifest to batches, in an order that is a pure function of (snapshot, seed, epoch).

An epoch is one pass over the manifest as it stood when the epoch began; shards published later join the next epoch.
The order does not depend on the number of ranks, so the whole state is (epoch, samples seen in it).

Letters: B local batch, G global batch, L caption tokens, V streams, T visits to shards.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from roclip import distributed
from roclip.config import Config
from roclip.data.cache import ShardCache, shard_cache
from roclip.data.eda import caption_edits
from roclip.data.order import EpochOrder, visits
from roclip.data.reader import BadSampleError, Readers, decode
from roclip.data.shards import Manifest, ShardRecord, digest
from roclip.errors import DataError, ShardError

Tokenize: TypeAlias = Callable[[Sequence[str]], Tensor]
CaptionEdit: TypeAlias = Callable[[str, int, int], str]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    tokens: Tensor
    """(B, L) int64."""
    ids: Tensor
    """(B,) int64: sample ids (`ShardReader.id`)."""
    valid: Tensor
    """(B,) bool: false where the sample could not be read (its pixels are zero then), and in rows beyond the global batch.
    Such rows must not enter the loss."""
    bad: tuple[tuple[str, str], ...]
    """(shard and key, reason) of the samples that could not be read."""
    cache_hits: int = 0
    """Shards opened for this batch that were in the cache."""
    cache_misses: int = 0
    """Shards opened for this batch that had to be fetched."""
    edited: Tensor | None = None
    """(B, L) int64: tokens of the captions' second view, where the stream has a `second_edit`."""

    def pin_memory(self) -> "Batch":
        """A copy with its tensors in page-locked memory; torch's loader calls it where batches go to a GPU."""
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
    """The shards of the manifest now, or only those with the given names, as recorded by an earlier snapshot.

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
    """Wait until the manifest has `min_shards` shards, among them `names` (those of a recorded snapshot), or until ingest has
    ended with at least one shard.

    Raises `DataError` after `wait_s` seconds, or when ingest ended without any shard.
    """
    deadline = time.monotonic() + wait_s
    while True:
        sealed, ended = {record.name for record in manifest.records()}, manifest.summary is not None
        found = len(sealed)
        if (found >= min_shards and sealed.issuperset(names)) or (ended and found):
            return
        if ended or time.monotonic() > deadline:
            raise DataError(
                f"{manifest.folder}: expected {max(min_shards, len(names))} sealed shards within {wait_s:.0f} s, got {found}. "
                "Look at the ingest stage's failures; `roclip ingest` runs it alone."
            )
        time.sleep(0.2)


@dataclass(frozen=True)
class StreamSettings:
    """How shards become batches: everything but the place of this process in the world."""

    image_size: int
    """S, side of the images in a batch, in pixels."""
    global_batch_size: int
    """G."""
    seed: int
    streams: int
    """V, virtual streams that an epoch's shards are dealt to; see `order.EpochOrder`."""
    shuffle_buffer: int
    """Samples that a virtual stream shuffles at a time."""
    last_batch: Literal["drop", "pad"] = "drop"
    """The samples at an epoch's end that do not fill a global batch: `drop` leaves them to another epoch, `pad` gives them a
    step of their own."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How often an epoch reads the samples of a source, by its name; 1 for a source that is not named. See `order.visits`."""
    resampled: bool = False
    """Whether an epoch's shards are drawn with replacement."""
    pieces: int = 1
    """Number of pieces that a rank's rows must divide into."""
    workers: int = 0
    """Processes that read ahead; 0 reads in this process."""
    caption_key: str = ""
    """Key of the json member that holds a sample's captions; empty reads the txt member."""

    @classmethod
    def of(cls, config: Config) -> "StreamSettings":
        """The settings of a training."""
        data = config.data
        return cls(
            image_size=config.ingest.image_size,
            global_batch_size=config.train.global_batch_size,
            seed=config.seed,
            streams=data.streams,
            shuffle_buffer=data.shuffle_buffer,
            last_batch=data.last_batch,
            weights=dict(zip(data.shards.split("::"), data.upsampling, strict=False)),
            resampled=data.resampled,
            pieces=config.train.grad_accum_steps,
            workers=data.loader_workers,
            caption_key=data.caption_key,
        )


class Stream:
    """Batches of this rank out of a folder of shards.

    Each rank has B = ceil(G / world size) rows, rounded up to a multiple of `pieces`. Rows beyond the global batch, or beyond
    the epoch, hold some other sample and are not valid, so that they do not change the loss.

    Args:
        shards: Folder with the manifest.
        tokenize: Captions to tokens (B, L).
        cache: Local copies of the shards, where `shards` is a store.
        edit: Changes a caption before it is tokenised: (caption, sample id, epoch) -> caption, a pure function.
        second_edit: Changes the edited caption once more, into the second view `Batch.edited`.
    """

    def __init__(
        self,
        shards: Path,
        settings: StreamSettings,
        *,
        tokenize: Tokenize,
        rank: int = 0,
        world_size: int = 1,
        cache: ShardCache | None = None,
        edit: CaptionEdit | None = None,
        second_edit: CaptionEdit | None = None,
    ):
        self.shards, self.settings, self.tokenize, self.cache = shards, settings, tokenize, cache
        self.edit, self.second_edit, self.rank = edit, second_edit, rank
        self.rows = rows_of_rank(settings.global_batch_size, world_size, settings.pieces)

    def plan(self, snapshot: Snapshot, epoch: int) -> "EpochPlan":
        """Which samples each step of an epoch over this snapshot reads. Raises `DataError` when it has less than one step."""
        settings, batch = self.settings, self.settings.global_batch_size
        shards = visits(
            [record.source for record in snapshot.records],
            settings.weights,
            seed=settings.seed,
            epoch=epoch,
            resampled=settings.resampled,
        )
        order = EpochOrder(
            [snapshot.records[shard].samples for shard in shards],
            seed=settings.seed,
            epoch=epoch,
            streams=settings.streams,
            shuffle_buffer=settings.shuffle_buffer,
            run_length=math.ceil(batch / settings.streams),
        )
        steps = -(-len(order) // batch) if settings.last_batch == "pad" else len(order) // batch
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
        """The batches of an epoch from `first_step` (counted from 0) on. A resume reads no sample a second time."""
        dataset = _Batches(self, plan, range(first_step, plan.steps))
        pin = torch.cuda.is_available()
        return iter(DataLoader(dataset, batch_size=None, num_workers=self.settings.workers, pin_memory=pin))

    def where(self, plan: "EpochPlan", step: int) -> list[str]:
        """Shard and key of each sample of a global batch, `step` counted from 0, for messages."""
        readers = Readers(self.shards, plan.snapshot.records)
        places = plan.samples_at(np.arange(step * plan.batch, min((step + 1) * plan.batch, plan.samples)))
        return [f"{readers[shard].record.name} {readers[shard].key(sample)}" for shard, sample in places.tolist()]


def open_stream(
    manifest: Manifest, config: Config, tokenize: Tokenize, second_edit: CaptionEdit | None = None
) -> Stream:
    """This rank's stream of a training: settings, cache and caption edits as the config says."""
    return Stream(
        manifest.root,
        StreamSettings.of(config),
        tokenize=tokenize,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        cache=shard_cache(config.data),
        edit=caption_edits(config.augment, config.seed),
        second_edit=second_edit,
    )


def rows_of_rank(global_batch_size: int, world_size: int, pieces: int = 1) -> int:
    """B, the rows of each rank: enough for the global batch, and a multiple of `pieces`."""
    return -(-global_batch_size // (world_size * pieces)) * pieces


@dataclass(frozen=True)
class EpochPlan:
    """The number of steps of an epoch, and the samples of each."""

    snapshot: Snapshot
    epoch: int
    shards: np.ndarray
    """(T,) for each visit the number of its shard in the snapshot."""
    order: EpochOrder
    """The order of the samples over the T visits."""
    batch: int
    """G."""
    steps: int

    @property
    def samples(self) -> int:
        """Number of samples that enter a step of the epoch."""
        return min(len(self.order), self.steps * self.batch)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the epoch (n,) to rows (n, 2) of (number of the shard in the snapshot, number of the sample in it)."""
        places = self.order.at(positions)
        places[:, 0] = self.shards[places[:, 0]]
        return places


def choose(captions: Sequence[str], seed: int, epoch: int, sample_id: int) -> str:
    """One of a sample's captions, drawn for (seed, epoch, sample): the same on any rank and after a resume."""
    if len(captions) == 1:
        return captions[0]
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, sample_id, 2])  # augment draws with a 0, eda with a 1
    return captions[int(np.random.Generator(bits).integers(len(captions)))]


class _Batches(Dataset):
    """The batches of an epoch as a map-style dataset, so that the loader can read ahead in other processes."""

    def __init__(self, stream: Stream, plan: EpochPlan, steps: range):
        self.stream, self.plan, self.steps = stream, plan, steps
        self.readers = Readers(stream.shards, plan.snapshot.records, stream.cache, stream.settings.caption_key)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Batch:
        stream, plan, step = self.stream, self.plan, self.steps[number]
        positions = step * plan.batch + stream.rank * stream.rows + np.arange(stream.rows)
        inside = positions < min((step + 1) * plan.batch, plan.samples)
        rows = plan.samples_at(np.where(inside, positions, positions % len(plan.order))).tolist()
        size, cached = stream.settings.image_size, _counts(stream.cache)
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
                captions[row] = choose(reader.captions(sample), stream.settings.seed, plan.epoch, int(ids[row]))
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
