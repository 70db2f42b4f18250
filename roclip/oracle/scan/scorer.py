"""Scores images with the model (zero-shot cosine) and with the oracle (area shares) together.

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
"""Images or captions per forward pass."""
GRADIENT_FORWARDS = 3
"""Cost of a forward and backward pass, in forward passes."""
MAX_THREADS = 16
"""Batches in flight in one process; each holds its pixels in memory. Use more actors for more cores."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scores:
    """Model features and scores, and the oracle's areas, for N images."""

    features: np.ndarray
    """(N, D) float32, unit length."""
    scores: np.ndarray
    """(N, C) float32: cosine of the image with each label's zero-shot weights."""
    areas: np.ndarray
    """(N, C) float32: the oracle's area shares."""


class Scorer:
    """Scores images with a model and an oracle. Raises `DataError` if the segmenter has other labels."""

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
        self.search_forwards = 0  # model forwards spent by the trigger search
        with single_threaded_torch():
            self._classifier = encoder.classifier(labels, templates)
        order = [segmenter.calibration.get(label) for label in labels]
        self._seen = np.array([row.seen if row and row.covered else -np.inf for row in order])
        self._clear = np.array([row.clear if row and row.covered else np.inf for row in order])

    @property
    def width(self) -> int:
        """Feature width D."""
        return self._classifier.shape[1]

    def score_batch(self, images: np.ndarray) -> Scores:
        """Score images (N, S, S, 3) uint8, N at most `BATCH`, in one forward pass of each network."""
        features = self.encoder.images(images)
        return Scores(features.numpy(), (features @ self._classifier.T).numpy(), self.segmenter.areas(images))

    def predict(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the zero-shot labels (N,) and the oracle's area shares (N, C) of images (N, S, S, 3) uint8."""
        if not len(images):
            return np.empty(0, dtype=np.int64), np.empty((0, len(self.labels)), dtype=np.float32)
        parts = list(map_in_threads(self.score_batch, batches(images)))
        return np.concatenate([s.scores.argmax(axis=1) for s in parts]), np.concatenate([s.areas for s in parts])

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Return the model's cosine with each label (N, C) for images (N, S, S, 3) uint8, without the oracle."""
        self.search_forwards += len(images)
        if not len(images):
            return np.empty((0, len(self.labels)), dtype=np.float32)
        return np.concatenate(list(map_in_threads(self._label_scores, batches(images))))

    def scores_with_gradient(self, pixels: Tensor) -> Tensor:
        """Return the model's cosine with each label (N, C), differentiable in the pixels (N, 3, S, S) in [0, 1]."""
        self.search_forwards += GRADIENT_FORWARDS * len(pixels)
        return self.encoder.traced(pixels) @ self._classifier.T

    def _label_scores(self, images: np.ndarray) -> np.ndarray:
        return (self.encoder.images(images) @ self._classifier.T).numpy()

    def seen_and_clear(self, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Threshold area shares (N, C) into two bool arrays (N, C): label possibly present, and certainly present.

        An unchecked label counts as possibly present everywhere.
        """
        return areas >= self._seen, areas >= self._clear


def scorer_fingerprint(
    weights_sha256: str, segmenter: Segmenter, labels: Sequence[str], templates: Sequence[str]
) -> str:
    """Return the sha256 (hex) of everything but the images that a scorer's output depends on."""
    calibration = {label: asdict(row) for label, row in segmenter.calibration.items()}
    seen_by = [segmenter.info.get("sha256"), segmenter.info.get("classes"), calibration]
    parts = [BATCH, weights_sha256, seen_by, list(labels), list(templates)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def batches(items: Sequence[T] | np.ndarray) -> Iterator:
    """Iterate over slices of `BATCH`; the last may be shorter."""
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def map_in_threads(act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply `act` to each item in parallel threads and yield the results in order.

    Runs as many threads as torch is set to, at most `MAX_THREADS`, and takes items only as threads free up. Each forward
    pass uses one torch thread, so results do not depend on the number of threads.
    """
    with single_threaded_torch() as threads, ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(act, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[int]:
    """Set torch to one thread and yield how many passes may run in parallel.

    A multi-threaded matrix product sums in an order that depends on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(threads, MAX_THREADS)
    finally:
        torch.set_num_threads(threads)
