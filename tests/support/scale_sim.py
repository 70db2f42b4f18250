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
    tars_a_batch: float = 1.0
    """Streams that a rank's rows come from; it fetches their tars one after the other."""


def stalled_step_s(step_s: float, global_batch: int, given: Fetching, random: np.random.Generator) -> float:
    """A mean step of an epoch whose tars are fetched when they are first needed, one connection a tar, all through one store.

    Streams advance alike and their tars are nearly equally long, so they ask for new ones nearly together; sizes vary by
    10 %. A batch is begun when the one `batches_ahead` before it is used up. The first tars of the epoch are not counted.
    """
    advance = global_batch / given.streams
    steps = max(200, int(20 * given.samples_per_tar / advance))
    tars = int(steps * advance / given.samples_per_tar * 1.5) + 2
    ends = random.normal(1.0, 0.1, (given.streams, tars)).clip(0.5) * given.samples_per_tar
    first = ends.cumsum(axis=1) / advance  # the step in which each stream opens its next tar
    asked = np.bincount(first[first < steps].astype(int), minlength=steps)
    used_s = np.zeros(steps)
    now_s = store_free_s = 0.0
    alone_s = given.tars_a_batch * (given.first_byte_s + given.tar_bytes / given.connection_bytes_per_s)
    for step in range(steps):
        begun_s = used_s[step - given.batches_ahead - 1] if step > given.batches_ahead else 0.0
        if asked[step]:
            moved_s = asked[step] * given.fetched_times * given.tar_bytes / given.store_bytes_per_s
            store_free_s = max(store_free_s, begun_s) + moved_s
            now_s = max(now_s, store_free_s, begun_s + alone_s)
        now_s += step_s
        used_s[step] = now_s
    return float(used_s[-1] - used_s[given.batches_ahead]) / (steps - 1 - given.batches_ahead)


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
