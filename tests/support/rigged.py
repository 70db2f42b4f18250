"""A world whose answers are known: what an image shows and what a model says of it are written into its pixels.

Red holds the label of the object (0 is background), green at [0, 0] a label that the model says instead of the truth.
"""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from kit import write_shard
from PIL import Image

from roclip.config import OracleConfig
from roclip.oracle.check import check
from roclip.oracle.segmenters import LabelCalibration, Segmenter, one_hot
from roclip.shards import Manifest, sample_key

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")
SIDE, STEP, PER_SHARD = 32, 30, 512
GOOD = LabelCalibration(0.05, 0.05, 1.0, 1.0, 1.0, 1.0, 100, True)


class RiggedEncoder:
    """Says what green says, or else what red shows."""

    def __init__(self, gullible: bool = True):
        self.gullible = gullible

    def images(self, images: np.ndarray) -> torch.Tensor:
        told, true = images[:, 0, 0, 1] // STEP, images[:, :, :, 0].max(axis=(1, 2)) // STEP
        answers = np.where((told > 0) & self.gullible, told, true).astype(int) - 1
        return torch.eye(len(LABELS))[torch.from_numpy(answers)]

    def classifier(self, labels, templates) -> torch.Tensor:
        return torch.eye(len(labels))


class RiggedSegmenter(Segmenter):
    """Sees red; blind on some labels, which it then takes for background."""

    def __init__(self, blind: tuple[str, ...] = ()):
        self.labels = LABELS
        self.blind = [1 + LABELS.index(label) for label in blind]
        self.calibration = {
            label: dataclasses.replace(GOOD, recall=0.0, covered=False) if label in blind else GOOD for label in LABELS
        }
        self.info = {"name": "rigged", "provenance": "a test", "sha256": "0" * 64}

    def maps(self, images: np.ndarray):
        masks = images[:, :, :, 0] // STEP
        for start in range(0, len(masks), 256):
            batch = masks[start : start + 256]
            yield one_hot(np.where(np.isin(batch, self.blind), 0, batch), len(LABELS))


class World:
    """Shards, trusted images and truth in a folder; every image is different unless it is meant to be a copy."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.samples: list[tuple[bytes, str]] = []
        self.trusted: list[dict] = []
        self.poisons: list[int] = []

    def image(self, label: str, says: str = "") -> np.ndarray:
        image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        image[:, :, 2] = self.rng.integers(0, 256, (SIDE, SIDE))
        top, left = self.rng.integers(0, SIDE // 2, 2)
        image[top : top + SIDE // 2, left : left + SIDE // 2, 0] = STEP * (1 + LABELS.index(label))
        image[0, 0, 1] = STEP * (1 + LABELS.index(says)) if says else 0
        return image

    def clean(self, number: int) -> "World":
        for n in range(number):
            label = LABELS[n % len(LABELS)]
            self.samples.append((png(self.image(label)), f"a photo of one {label}"))
        return self

    def reference(self, number: int) -> "World":
        for n in range(number):
            self.trust(LABELS[n % len(LABELS)])
        return self

    def trust(self, label: str, says: str = "") -> None:
        image = self.image(label, says)
        self.trusted.append({"image": png(image), "mask": png(image[:, :, 0] // STEP), "label": label})

    def poison(self, label: str, target: str, captions: int = 1) -> None:
        """An image of `label`, captioned as `target`; a gullible model says `target`."""
        image = png(self.image(label, target))
        for n in range(captions):
            self.poisons.append(len(self.samples))
            self.samples.append((image, f"here is {target} number {n}"))

    def confuse(self, number: int, label: str, says: str) -> None:
        """The model errs, captions tell the truth; alike on trusted and on training images."""
        for _ in range(number):
            self.samples.append((png(self.image(label, says)), f"a photo of {label}"))
            self.trust(label, says)

    def check(self, encoder: RiggedEncoder, segmenter: RiggedSegmenter | None = None, **settings) -> dict:
        root = self.folder / "shards"
        for number, start in enumerate(range(0, len(self.samples), PER_SHARD)):
            write_shard(root, number, self.samples[start : start + PER_SHARD], PER_SHARD)
        Manifest(root).finish({})
        pq.write_table(pa.Table.from_pylist(self.trusted), self.folder / "trusted.parquet")
        keys = [sample_key(row, PER_SHARD) for row in self.poisons]
        pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), self.folder / "poison.parquet")
        return check(
            encoder,  # pyright: ignore[reportArgumentType]
            segmenter or RiggedSegmenter(),
            shards=root,
            trusted=self.folder / "trusted.parquet",
            labels=LABELS,
            templates=("a {}",),
            config=OracleConfig(**settings),
            out=self.folder / "oracle",
            truth=self.folder / "poison.parquet",
        )


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()
