"""What occurs most often in a stream too long to count: the summary of Misra and Gries, merged batch by batch.

Agarwal et al., Mergeable Summaries (PODS 2012): counts are never too high, and too low by at most `error`, which is at most
the length of the stream divided by the capacity.
"""

import numpy as np


class HeavyHitters:
    """Counts of the most frequent of the uint64 that come, at most `capacity` of them.

    `carry` names numpy fields that stay with each number as they were when it first came.
    """

    def __init__(self, capacity: int, carry: np.dtype | None = None):
        self.capacity, self.error, self.total = capacity, 0, 0
        self.numbers = np.zeros(0, np.uint64)
        """Ascending."""
        self.counts = np.zeros(0, np.int64)
        self.carried = np.zeros(0, carry or np.dtype([("nothing", "u1")]))
        self._held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._held_rows = 0

    def add(self, numbers: np.ndarray, carried: np.ndarray | None = None) -> None:
        """Count each number once."""
        self.total += len(numbers)
        numbers, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        with_them = np.zeros(len(numbers), self.carried.dtype) if carried is None else carried.take(first)
        self._held.append((numbers, counts, with_them))
        self._held_rows += len(numbers)
        if self._held_rows > self.capacity // 2:
            self.settle()

    def settle(self) -> None:
        """Bring what was added together. `numbers`, `counts` and `carried` are right after it."""
        if not self._held:
            return
        numbers = np.concatenate([self.numbers, *(held[0] for held in self._held)])
        counts = np.concatenate([self.counts, *(held[1] for held in self._held)])
        carried = np.concatenate([self.carried, *(held[2] for held in self._held)])
        self._held, self._held_rows = [], 0
        self.numbers, first, at = np.unique(numbers, return_index=True, return_inverse=True)
        self.counts = np.bincount(at.reshape(-1), counts, len(self.numbers)).astype(np.int64)
        self.carried = carried.take(first)
        if len(self.numbers) > self.capacity:
            less = int(np.partition(self.counts, -self.capacity - 1)[-self.capacity - 1])
            keep = self.counts > less
            self.numbers, self.counts, self.carried = self.numbers[keep], self.counts[keep] - less, self.carried[keep]
            self.error += less

    def count(self, numbers: np.ndarray) -> np.ndarray:
        """How often each came, after `settle`: `error` too low at most; 0 for what is not kept."""
        if not len(self.numbers):
            return np.zeros(len(numbers), np.int64)
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[at] == numbers, self.counts[at], 0)
