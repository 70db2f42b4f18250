"""The model's zero-shot answer and the oracle's sight of the same pictures, side by side.

Letters: N images, C labels, D feature width, S side of the images in pixels.
"""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from roclip.errors import DataError
from roclip.model.towers import Encoder
from roclip.oracle.segmenters.base import Segmenter

BATCH = 64
"""Images, or captions, of one forward pass."""
PASSES_WITH_GRADIENT = 3
"""What a pass forward and back costs, in passes forward."""
MAX_THREADS = 16
"""Batches under way in one process, which each have their pixels in memory. For more cores take more actors."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scores:
    """What model and oracle say of N images."""

    features: np.ndarray
    """(N, D) float32, unit length."""
    scores: np.ndarray
    """(N, C) float32: cosine of the image and each label's zero-shot weights."""
    areas: np.ndarray
    """(N, C) float32: the oracle's area shares."""


class Scorer:
    """Shows a batch of images to both. Raises `DataError` when the segmenter knows other labels."""

    def __init__(
        self,
        encoder: Encoder,
        segmenter: Segmenter,
        labels: Sequence[str],
        templates: Sequence[str],
        synonyms: Mapping[str, str] | None = None,
    ):
        if tuple(segmenter.labels) != tuple(labels):
            raise DataError(
                f"oracle: expected a segmenter for {', '.join(labels)}; it knows {', '.join(segmenter.labels)}. "
                "Train one for these labels: leave oracle.weights empty."
            )
        self.encoder, self.segmenter, self.labels, self.synonyms = encoder, segmenter, tuple(labels), synonyms
        self.asked = 0  # forward passes of pictures that a search has cost
        with one_thread_a_pass():
            self._classifier = encoder.classifier(labels, templates)
        order = [segmenter.calibration.get(label) for label in labels]
        self._seen = np.array([row.seen if row and row.covered else -np.inf for row in order])
        self._clear = np.array([row.clear if row and row.covered else np.inf for row in order])

    @property
    def width(self) -> int:
        """D."""
        return self._classifier.shape[1]

    def sight(self, images: np.ndarray) -> Scores:
        """One forward pass of each for (N, S, S, 3) uint8, N at most `BATCH`."""
        features = self.encoder.images(images)
        return Scores(features.numpy(), (features @ self._classifier.T).numpy(), self.segmenter.areas(images))

    def ask(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers (N,) and area shares (N, C) for images (N, S, S, 3) uint8."""
        if not len(images):
            return np.empty(0, dtype=np.int64), np.empty((0, len(self.labels)), dtype=np.float32)
        sights = list(side_by_side(self.sight, batches(images)))
        return np.concatenate([s.scores.argmax(axis=1) for s in sights]), np.concatenate([s.areas for s in sights])

    def scores(self, images: np.ndarray) -> np.ndarray:
        """(N, S, S, 3) uint8 to the model's cosine with each label (N, C), without the oracle."""
        self.asked += len(images)
        if not len(images):
            return np.empty((0, len(self.labels)), dtype=np.float32)
        return np.concatenate(list(side_by_side(self._scores, batches(images))))

    def soft_scores(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] to the model's cosine with each label (N, C), with gradients to the pixels."""
        self.asked += PASSES_WITH_GRADIENT * len(pixels)
        return self.encoder.traced(pixels) @ self._classifier.T

    def _scores(self, images: np.ndarray) -> np.ndarray:
        return (self.encoder.images(images) @ self._classifier.T).numpy()

    def sees(self, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Area shares to (N, C) bool each: may be there, certainly is there. An unchecked label may be anywhere."""
        return areas >= self._seen, areas >= self._clear


def made_by(weights_sha256: str, segmenter: Segmenter, labels: Sequence[str], templates: Sequence[str]) -> str:
    """Names all that a witness's word depends on, beside the images: sha256, in hex."""
    calibration = {label: asdict(row) for label, row in segmenter.calibration.items()}
    seen_by = [segmenter.info.get("sha256"), segmenter.info.get("classes"), calibration]
    parts = [BATCH, weights_sha256, seen_by, list(labels), list(templates)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def batches(items: Sequence[T] | np.ndarray) -> Iterator:
    """Slices of `BATCH` each, the last of what is left."""
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def side_by_side(act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`act` of each item, in their order, as many at a time as torch has threads, at most `MAX_THREADS`.

    No more items are taken than are under way. Each forward pass has one thread, so its bits do not depend on how many
    there are.
    """
    with one_thread_a_pass() as threads, ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(act, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def one_thread_a_pass() -> Iterator[int]:
    """Gives how many passes may run side by side. Matrix products of several threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, MAX_THREADS)
    finally:
        torch.set_num_threads(threads)
