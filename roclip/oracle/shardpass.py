"""One sequential pass over the sealed shards: every distinct image is shown once to the model and once to the oracle.

Letters: N distinct images, M captions, C labels.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from roclip.errors import DataError
from roclip.metrics import Progress
from roclip.model import Encoder
from roclip.oracle.naming import name_labels
from roclip.oracle.segmenters import Segmenter
from roclip.oracle.statistics import Observations
from roclip.reader import BadSampleError, ShardReader, decode
from roclip.shards import Manifest, ShardRecord

BATCH = 256
MAX_SIDE_PX = 512


@dataclass(frozen=True)
class Looked:
    """What the pass found; `keys`, `captions` and `places` have one entry a caption, the rest one an image."""

    observations: Observations
    areas: np.ndarray
    """(N, C) float: the oracle's area shares."""
    sha256: list[str]
    """Of the original image's bytes where img2dataset noted it, else of the stored ones."""
    keys: list[str]
    captions: list[str]
    places: list[tuple[str, int]]
    """Shard and sample number within it."""
    size_px: int
    """Side at which the images were looked at."""
    unreadable: int

    def captions_of(self) -> list[list[int]]:
        """For each image, its entries of `keys` and `captions`."""
        rows: list[list[int]] = [[] for _ in self.sha256]
        for row, image in enumerate(self.observations.image):
            rows[image].append(row)
        return rows


class Witness:
    """The model's zero-shot answer and the oracle's sight, side by side."""

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
        self._classifier = encoder.classifier(labels, templates)
        order = [segmenter.calibration.get(label) for label in labels]
        self._seen = np.array([row.seen if row and row.covered else -np.inf for row in order])
        self._clear = np.array([row.clear if row and row.covered else np.inf for row in order])

    def ask(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Answers (N,) and area shares (N, C) for images (N, S, S, 3) uint8."""
        if not len(images):
            return np.empty(0, dtype=np.int64), np.empty((0, len(self.labels)), dtype=np.float32)
        answers, areas = [], []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            answers.append((self.encoder.images(batch) @ self._classifier.T).argmax(dim=1).numpy())
            areas.append(self.segmenter.areas(batch))
        return np.concatenate(answers), np.concatenate(areas)

    def sees(self, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Area shares to (N, C) bool each: may be there, certainly is there. An unchecked label may be anywhere."""
        return areas >= self._seen, areas >= self._clear


def look(witness: Witness, shards: Path, say: Progress, caption_key: str = "") -> Looked:
    """Read every usable sample of every sealed shard once, with its first caption (`ShardReader`).

    Raises `DataError` where there is no shard.
    """
    records = Manifest(shards).records()
    if not records:
        raise DataError(f"{shards}: expected sealed shards, got none. Run `roclip ingest` first.")
    numbers: dict[str, int] = {}
    image: list[int] = []
    keys: list[str] = []
    captions: list[str] = []
    places: list[tuple[str, int]] = []
    answers, areas, waiting = [], [], []
    unreadable = size = 0
    for number, record in enumerate(records, start=1):
        reader, originals = ShardReader(shards, record, caption_key=caption_key), _originals(shards, record)
        for sample in range(len(reader.index["key"])):
            key = reader.key(sample)
            try:
                encoded, caption = reader.read(sample)
                sha = originals.get(key) or hashlib.sha256(encoded).hexdigest()
                if sha not in numbers:
                    size = size or _side(encoded)
                    waiting.append(decode(encoded, size))
                    numbers[sha] = len(numbers)
            except BadSampleError:
                unreadable += 1
                continue
            image.append(numbers[sha])
            keys.append(key)
            captions.append(caption)
            places.append((record.name, sample))
            if len(waiting) == BATCH:
                _flush(witness, waiting, answers, areas)
        reader.close()
        say(number, len(records), f"{record.name}: {len(keys):,} samples, {len(numbers):,} distinct images so far")
    _flush(witness, waiting, answers, areas)
    named = name_labels(captions, witness.labels, witness.synonyms)
    answer = np.concatenate(answers) if answers else np.empty(0, dtype=np.int64)
    area = np.concatenate(areas) if areas else np.empty((0, len(witness.labels)), dtype=np.float32)
    seen, clear = witness.sees(area)
    observations = Observations(answer, seen, clear, np.array(image, dtype=np.int64), named)
    return Looked(observations, area, list(numbers), keys, captions, places, size, unreadable)


def _flush(witness: Witness, waiting: list[np.ndarray], answers: list, areas: list) -> None:
    if waiting:
        answer, area = witness.ask(np.stack(waiting))
        answers.append(answer)
        areas.append(area)
        waiting.clear()


def _originals(shards: Path, record: ShardRecord) -> dict[str, str]:
    """Key -> sha256 of the bytes that were fetched, where img2dataset noted it."""
    path = shards / f"{Path(record.name).stem}.parquet"
    if not path.exists() or not {"key", "sha256"} <= set(pq.read_schema(path).names):
        return {}
    table = pq.read_table(path, columns=["key", "sha256"])
    return {key: sha for key, sha in zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True) if sha}


def _side(encoded: bytes) -> int:
    """Side at which to look: that of the first image, whose size the others of a run share."""
    try:
        with Image.open(io.BytesIO(encoded)) as first:
            return max(16, min(MAX_SIDE_PX, max(first.size)))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable_image") from error
