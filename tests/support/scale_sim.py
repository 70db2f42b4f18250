"""What the mean step of `scale_model.py` does not say: the slowest rank, failures, bursts at the store, data that arrive.

Simulations over numbers; nothing waits. Each draws from a generator that it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def slowest_rank(step_s: Sequence[float], gpus: int, random: np.random.Generator, steps: int = 10_000) -> float:
    """How much longer a step of W ranks takes than a median rank's: each waits for the slowest.

    Draws each rank's step from measured ones of one rank, in units of their median. What is rarer than one of these steps
    was not seen, so the result is a lower bound.
    """
    measured = np.asarray(step_s) / np.median(step_s)
    slowest = random.random(steps) ** (1 / gpus)  # the quantile that the largest of W uniform numbers has
    return float(np.quantile(measured, slowest).mean())


@dataclass(frozen=True)
class Failures:
    """How often something breaks and what it costs."""

    gpu_hours_between: float
    checkpoint_every_s: float
    checkpoint_still_s: float
    checkpoint_written_s: float
    """After the still time: a checkpoint counts when it is on disk."""
    restart_s: float


def goodput(gpus: int, given: Failures, random: np.random.Generator, days: float = 300.0) -> float:
    """Share of the time that ends up in training which is kept: failures fall on any GPU at any time, work since the last
    whole checkpoint is lost, and the restart takes its time and may be hit as well."""
    mean_s = given.gpu_hours_between * 3600 / gpus
    now_s = kept_s = 0.0
    while now_s < days * 86_400:
        until_s = random.exponential(mean_s) - given.restart_s
        if until_s > 0:
            period_s = given.checkpoint_every_s + given.checkpoint_still_s
            whole = int(max(0.0, until_s - given.checkpoint_written_s) // period_s)
            kept_s += whole * given.checkpoint_every_s
        now_s += max(until_s, 0.0) + given.restart_s
    return kept_s / now_s


@dataclass(frozen=True)
class Fetching:
    """Tars on a store, and how they are read."""

    ranks: int
    streams: int
    samples_per_tar: int
    tar_bytes: float
    store_bytes_per_s: float
    connection_bytes_per_s: float
    first_byte_s: float
    batches_ahead: int
    """A rank's loader: two a worker."""
    fetched_times: float
    """By how many nodes a tar is fetched."""
    tars_ahead: bool = False
    """Whether a stream's next tar is fetched while it reads one, instead of when it is needed."""


def stalled_step_s(step_s: float, global_batch: int, given: Fetching, random: np.random.Generator) -> float:
    """A mean step of an epoch whose tars are fetched as it goes, one connection a tar, all through one store.

    A stream asks for its next tar when it needs it, or when it opens the one before; sizes of tars vary by 10 %. The streams
    of one rank wait for each other's tars. A batch is begun when the one `batches_ahead` before it is used up. The first
    tars of the epoch are not counted.
    """
    advance = global_batch / given.streams
    steps = max(200, int(20 * given.samples_per_tar / advance))
    tars = int(steps * advance / given.samples_per_tar * 1.5) + 2
    sizes = random.normal(1.0, 0.1, (given.streams, tars)).clip(0.5) * given.samples_per_tar
    sizes[:, 0] *= random.random(given.streams)  # in the middle of an epoch no two stand alike
    opened = (sizes.cumsum(axis=1) / advance).astype(int)
    asked = np.c_[np.zeros(given.streams, dtype=int), opened[:, :-1]] if given.tars_ahead else opened
    alone_s = given.first_byte_s + given.tar_bytes / given.connection_bytes_per_s
    share_s = given.fetched_times * given.tar_bytes / given.store_bytes_per_s
    ready_s, used_s = np.zeros(max(steps, opened.max()) + 1), np.zeros(steps)
    now_s = store_free_s = 0.0
    for step in range(steps):
        begun_s = used_s[step - given.batches_ahead - 1] if step > given.batches_ahead else 0.0
        turns = dict.fromkeys(range(given.ranks), 0)
        for stream, tar in np.argwhere(asked == step):
            rank = int(stream) * given.ranks // given.streams
            turns[rank] += 1
            store_free_s = max(store_free_s, begun_s) + share_s
            done_s = max(store_free_s, begun_s + alone_s * turns[rank])
            ready_s[opened[stream, tar]] = max(ready_s[opened[stream, tar]], done_s)
        now_s = max(now_s, ready_s[step]) + step_s
        used_s[step] = now_s
    return float(used_s[-1] - used_s[steps // 4]) / (steps - 1 - steps // 4)


@dataclass(frozen=True)
class Arrival:
    """How a training over data that still arrive went."""

    hours: float
    seen_frac: float
    """Share of the data that was in the last epoch's snapshot."""
    samples_frac: float
    """Samples trained on, of epochs x all data."""


def train_while_arriving(
    images: float, ingest_per_s: float, train_per_s: float, epochs: int, start_frac: float
) -> Arrival:
    """Epochs over what has arrived when each begins, the first as soon as `start_frac` of the data is there."""
    now_s, snapshot, seen = start_frac * images / ingest_per_s, 0.0, 0.0
    for _ in range(epochs):
        snapshot = min(images, now_s * ingest_per_s)
        now_s += snapshot / train_per_s
        seen += snapshot
    return Arrival(now_s / 3600, snapshot / images, seen / (epochs * images))
