"""Heavy hitters: the most frequent items of a long stream, by the summary of Misra and Gries, merged batch by batch.

Agarwal et al., Mergeable Summaries (PODS 2012): counts are never too high, and too low by at most `error`, which is at most the
length of the stream divided by the capacity.
"""

import numpy as np


class HeavyHitters:
    """Counts of the most frequent uint64 numbers of a stream, at most `capacity` of them.

    `payload` is the numpy type of a value that is kept for each number, as it was when the number first came.
    """

    def __init__(self, capacity: int, payload: np.dtype | None = None):
        self.capacity, self.error, self.total = capacity, 0, 0
        self.numbers = np.zeros(0, np.uint64)
        """Ascending."""
        self.counts = np.zeros(0, np.int64)
        self.payload = np.zeros(0, payload or np.dtype([("nothing", "u1")]))
        self._buffer: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._buffered_rows = 0

    def add(self, numbers: np.ndarray, payload: np.ndarray | None = None) -> None:
        """Count each number once."""
        self.total += len(numbers)
        numbers, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        payloads = np.zeros(len(numbers), self.payload.dtype) if payload is None else payload.take(first)
        self._buffer.append((numbers, counts, payloads))
        self._buffered_rows += len(numbers)
        if self._buffered_rows > self.capacity // 2:
            self.merge()

    def merge(self) -> None:
        """Merge buffered batches, after which `numbers`, `counts` and `payload` are up to date."""
        if not self._buffer:
            return
        numbers = np.concatenate([self.numbers, *(held[0] for held in self._buffer)])
        counts = np.concatenate([self.counts, *(held[1] for held in self._buffer)])
        payload = np.concatenate([self.payload, *(held[2] for held in self._buffer)])
        self._buffer, self._buffered_rows = [], 0
        self.numbers, first, at = np.unique(numbers, return_index=True, return_inverse=True)
        self.counts = np.bincount(at.reshape(-1), counts, len(self.numbers)).astype(np.int64)
        self.payload = payload.take(first)
        if len(self.numbers) > self.capacity:
            decrement = int(np.partition(self.counts, -self.capacity - 1)[-self.capacity - 1])
            keep = self.counts > decrement
            self.numbers, self.counts, self.payload = (
                self.numbers[keep],
                self.counts[keep] - decrement,
                self.payload[keep],
            )
            self.error += decrement

    def count(self, numbers: np.ndarray) -> np.ndarray:
        """The count of each number, after `merge`: at most `error` too low; 0 for a number that is not kept."""
        if not len(self.numbers):
            return np.zeros(len(numbers), np.int64)
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return np.where(self.numbers[at] == numbers, self.counts[at], 0)
