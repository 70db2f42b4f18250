"""The order of an epoch's samples: a pure function of (snapshot, seed, epoch) that is never materialised.

Shards are permuted and dealt to V virtual streams. Each stream shuffles its samples within consecutive buffers. Then the streams
take turns, `run_length` samples a turn, until all are empty. The sample at a position is computed on demand, so that an order of
billions of samples takes a few numbers a shard, and a resume takes no time. It does not depend on the number of ranks.

Letters: S shards, V streams, N samples, T visits to shards.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_OF_VISITS = 2**63
"""A stream number that no virtual stream has, so that visits have a random generator of their own."""


def visits(
    sources: Sequence[str], weights: Mapping[str, float], *, seed: int, epoch: int, resampled: bool = False
) -> np.ndarray:
    """Which shards an epoch reads, some of them more than once.

    A shard of a source of weight w is read floor(w) times, and once more if it is among the share w - floor(w) of its
    source's shards that is drawn for this epoch. With `resampled` as many shards are drawn with replacement instead, in
    proportion to their weights.

    Args:
        sources: (S,) the source of each shard of the snapshot, in its order.
        weights: Weight of each source; 1 for a source that is not named.

    Returns:
        (T,) int64 numbers of shards, ascending.
    """
    if not weights and not resampled:
        return np.arange(len(sources))
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, _OF_VISITS, 0]))
    names, which = np.unique(np.asarray(sources, dtype=object), return_inverse=True)
    weight = np.array([weights.get(name, 1.0) for name in names])
    times = np.floor(weight).astype(np.int64)[which]
    for number, share in enumerate(weight % 1):
        held = np.flatnonzero(which == number)
        times[generator.permutation(held)[: round(share * len(held))]] += 1
    if resampled:
        drawn = generator.choice(len(which), size=times.sum(), p=weight[which] / weight[which].sum())
        times = np.bincount(drawn, minlength=len(which))
    return np.repeat(np.arange(len(which)), times)


class EpochOrder:
    """Position in the epoch -> (shard, sample), each of the N samples exactly once.

    Args:
        samples: (S,) number of samples of each shard, in the snapshot's order.
        streams: V; the number of shards where that is smaller.
        shuffle_buffer: Samples that a stream shuffles at a time.
        run_length: Samples that a stream gives a turn: ceil(G / V), so that the rows of one rank come from few streams.
    """

    def __init__(
        self,
        samples: Sequence[int] | np.ndarray,
        *,
        seed: int,
        epoch: int,
        streams: int,
        shuffle_buffer: int,
        run_length: int,
    ):
        samples = np.asarray(samples, dtype=np.int64)
        self.seed, self.epoch = seed, epoch
        self.shuffle_buffer, self.run_length = shuffle_buffer, run_length
        streams = max(1, min(streams, len(samples)))
        turns = -(-len(samples) // streams)
        dealt = np.full(turns * streams, -1)
        dealt[: len(samples)] = self._generator().permutation(len(samples))
        self._shards = np.ascontiguousarray(dealt.reshape(turns, streams).T)
        held = np.where(self._shards >= 0, samples[self._shards] if len(samples) else 0, 0)
        self._ends = held.cumsum(axis=1)
        """(V, ceil(S / V)): cumulative number of samples up to the end of each shard in its stream."""
        self._lengths = held.sum(axis=1)
        # A stream of n samples gives whole runs before turn n // run_length, a part of one in it, and none after it, so all
        # turns between two such turns are alike.
        empty = self._lengths // run_length
        self._changes = np.unique(np.concatenate([[0], empty, empty + 1]))
        self._taken = np.array([np.minimum(self._lengths, turn * run_length).sum() for turn in self._changes])
        self._buffers: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self._lengths.sum())

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Positions in the epoch (n,), from 0, to int64 rows (n, 2) of (shard number, sample number in the shard)."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(
                f"positions of an epoch of {len(self)} samples: got {positions.min()} to {positions.max()}"
            )
        stream, place = self._in_streams(positions)
        rows = np.empty((len(positions), 2), dtype=np.int64)
        for number, (which, buffer) in _groups(stream, place // self.shuffle_buffer):
            shuffled = buffer * self.shuffle_buffer + self._shuffle(which, buffer)[place[number] % self.shuffle_buffer]
            turn = np.searchsorted(self._ends[which], shuffled, side="right")
            before = np.where(turn > 0, self._ends[which][turn - 1], 0)
            rows[number, 0], rows[number, 1] = self._shards[which][turn], shuffled - before
        return rows

    def _in_streams(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each position, and the position within the stream."""
        stream, place = np.empty_like(positions), np.empty_like(positions)
        period = np.searchsorted(self._taken, positions, side="right") - 1
        for each in np.unique(period):
            chosen = period == each
            run = np.clip(self._lengths - self._changes[each] * self.run_length, 0, self.run_length)
            ends = run.cumsum()
            turn, within = np.divmod(positions[chosen] - self._taken[each], ends[-1])
            stream[chosen] = which = np.searchsorted(ends, within, side="right")
            place[chosen] = (self._changes[each] + turn) * self.run_length + within - (ends - run)[which]
        return stream, place

    def _shuffle(self, stream: int, buffer: int) -> np.ndarray:
        """The permutation of a stream's buffer. The latest one of each stream is cached."""
        if self._buffers.get(stream, (-1,))[0] != buffer:
            size = min(self.shuffle_buffer, self._lengths[stream] - buffer * self.shuffle_buffer)
            self._buffers[stream] = buffer, self._generator(stream + 1, buffer).permutation(size)
        return self._buffers[stream][1]

    def _generator(self, stream: int = 0, buffer: int = 0) -> np.random.Generator:
        """An independent generator for the permutation of shards (stream 0) and for each buffer of each stream."""
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch], counter=[0, 0, stream, buffer]))


def _groups(*columns: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """Group rows by the values of all columns: (row numbers, values) of each group."""
    order = np.lexsort(columns)
    table = np.stack(columns, axis=1)[order]
    starts = np.flatnonzero((np.diff(table, axis=0, prepend=-1) != 0).any(axis=1))
    for number in np.split(order, starts[1:]) if len(order) else ():
        yield number, tuple(int(column[number[0]]) for column in columns)
