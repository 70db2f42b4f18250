"""Throughput, waiting times and unreadable samples between two logged steps, over all ranks."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from roclip import distributed
from roclip.data.stream import Batch


class Meter:
    """Counts from one `row` to the next, and estimates the time left.

    Args:
        progress: Epochs done when this process started.
        epochs: Epochs of the whole training.
    """

    def __init__(self, progress: float, epochs: int):
        self.epochs, self._began_with, self._began_s = epochs, progress, time.monotonic()
        self._bad: Counter[str] = Counter()
        self._clear()

    def begin_epoch(self) -> None:
        """Reset the counts of unreadable samples, which are per epoch, and exclude the time between epochs from step times."""
        self._bad.clear()
        self._clear()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the wait for a batch."""
        start = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start

    def step(self, batch: Batch, samples: int) -> None:
        """Count a step that has ended.

        Args:
            samples: Samples of the global batch.
        """
        now = time.monotonic()
        self._steps_s.append(now - self._last_s)
        self._last_s = now
        self._samples += samples
        self._bad.update(reason for _, reason in batch.bad)
        self._cache += np.array([batch.cache_hits, batch.cache_misses])

    def row(self, progress: float) -> dict:
        """The metrics since the last row. Every rank must call it; all get the same values.

        Args:
            progress: Epochs done, with the fraction of the current one.
        """
        elapsed_s = self._last_s - self._start_s
        median_s, slow_s = np.percentile(self._steps_s, [50, 99])
        mine = (round(median_s, 4), round(slow_s, 4), self._waited_s / elapsed_s, self._bad, self._cache)
        medians, slowest, waits, bad, cache = zip(*distributed.gather_objects(mine), strict=True)
        reasons: Counter[str] = sum(bad, start=Counter())
        hits, misses = np.sum(cache, axis=0).tolist()
        done = progress - self._began_with
        row = {
            "samples_per_s": self._samples / elapsed_s,
            "data_wait_frac": float(np.mean(waits)),
            "step_s_p50": medians,
            "step_s_p99": slowest,
            "bad_samples": reasons.total(),
            "bad_reasons": dict(reasons.most_common()),
            "cache_hits": hits,
            "cache_misses": misses,
            "eta_s": round((time.monotonic() - self._began_s) * (self.epochs - progress) / done, 1),
        }
        self._clear()
        return row

    def _clear(self) -> None:
        self._start_s = self._last_s = time.monotonic()
        self._steps_s: list[float] = []
        self._waited_s, self._samples, self._cache = 0.0, 0, np.zeros(2, dtype=np.int64)
