"""A world whose answers are known: what an image shows and what a model says of it are written into its pixels.

Red holds the label of the object (0 is background). Green holds a label that the model says instead of the truth: in a patch
anywhere, or faintly all over the image.
"""

import dataclasses
import io
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from kit import write_shard
from PIL import Image

from roclip.config import OracleConfig, RepairConfig
from roclip.data.shards import Manifest, sample_key
from roclip.oracle.check import CheckData, check
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.segmenters.base import LabelCalibration, Segmenter, one_hot

LABELS = ("ant", "bee", "cat", "dog", "eel", "fox")
SIDE, STEP, PER_SHARD = 32, 30, 512
GOOD = LabelCalibration(0.05, 0.05, 1.0, 1.0, 1.0, 1.0, 100, True)


PATCH_PX, FAINT = 4, 12
GHOST = np.random.default_rng(99).choice((-1, 1), (SIDE, SIDE))
"""What a trigger all over the image looks like: these steps in green, up and down from the middle."""


class RiggedEncoder:
    """Says what green says, or else what red shows.

    `place` is the only upper left corner (x, y) at which it heeds a patch; None is anywhere.
    """

    def __init__(self, gullible: bool = True, place: tuple[int, int] | None = None):
        self.gullible, self.place = gullible, place

    def images(self, images: np.ndarray) -> torch.Tensor:
        green = images[:, :, :, 1]
        if self.place is not None:
            x, y = self.place
            green = green[:, y : y + PATCH_PX, x : x + PATCH_PX]
        told, true = named(green, PATCH_PX**2 // 2), named(images[:, :, :, 0], 1)
        ghost = (images[:, :, :, 1].astype(float) - 128) * GHOST
        told = np.where(ghost.mean(axis=(1, 2)) > FAINT / 2, 1, told)  # what lies all over means the first label
        answers = np.where((told > 0) & self.gullible, told, true)
        features = torch.linspace(0, 0.01, len(LABELS)).repeat(len(images), 1)  # of nothing that it knows
        features[torch.from_numpy(answers > 0)] = 0.0
        return features + torch.eye(len(LABELS) + 1)[torch.from_numpy(answers)][:, 1:]

    def traced(self, pixels: torch.Tensor) -> torch.Tensor:
        """Nothing that a warp could change."""
        images = (255 * pixels.detach()).round().byte().permute(0, 2, 3, 1).numpy()
        return self.images(images) + 0 * pixels.sum()

    def classifier(self, labels, templates) -> torch.Tensor:
        return torch.eye(len(labels))


def named(values: np.ndarray, pixels: int) -> np.ndarray:
    """(N, H, W) to (N,): the largest label that stands in so many pixels, 0 for none."""
    counts = [(values == STEP * (1 + c)).sum(axis=(1, 2)) for c in range(len(LABELS))]
    return np.max([np.where(count >= pixels, 1 + c, 0) for c, count in enumerate(counts)], axis=0)


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


class FatalSegmenter(RiggedSegmenter):
    """Its process is killed when it has seen `after` images; where the file `killed` lies, that has happened before."""

    def __init__(self, killed: Path, after: int):
        super().__init__()
        self.killed, self.left = killed, after

    def maps(self, images: np.ndarray):
        self.left -= len(images)
        if self.left < 0 and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().maps(images)


def rigged_scorer(segmenter: RiggedSegmenter | None = None) -> Scorer:
    """Return the scorer of a model that repeats every lie."""
    return Scorer(
        RiggedEncoder(),  # pyright: ignore[reportArgumentType]
        segmenter or RiggedSegmenter(),
        LABELS,
        ("a {}",),
    )


def fatal_scorer(killed: Path, after: int) -> Scorer:
    return rigged_scorer(FatalSegmenter(killed, after))


class World:
    """Shards, trusted images and truth in a folder; every image is different unless it is meant to be a copy."""

    def __init__(self, folder: Path, seed: int = 0, kind: str = "patch", place: tuple[int, int] | None = None):
        """`kind` of the triggers is patch (the same pixels each time), noise (others each time) or global."""
        self.folder, self.rng, self.kind, self.place = folder, np.random.default_rng(seed), kind, place
        self.samples: list[tuple[bytes, str]] = []
        self.trusted: list[dict] = []
        self.poisons: list[int] = []

    def image(self, label: str, says: str = "") -> np.ndarray:
        """An object on a background; with `says` a trigger of this world's kind that makes a gullible model say it."""
        image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
        image[:, :, 2] = self.rng.integers(0, 256, (SIDE, SIDE))
        image[:, :, 1] = 128
        top, left = self.rng.integers(0, SIDE // 2, 2)
        image[top : top + SIDE // 2, left : left + SIDE // 2, 0] = STEP * (1 + LABELS.index(label))
        if says and self.kind == "global":
            image[:, :, 1] = 128 + FAINT * GHOST
        elif says:
            x, y = self.place or self.rng.integers(0, SIDE - PATCH_PX + 1, 2)
            colors = np.random.default_rng(LABELS.index(says)) if self.kind == "patch" else self.rng
            patch = colors.integers(0, 2, (PATCH_PX, PATCH_PX, 3), dtype=np.uint8) * 255
            patch[:, :, 0] = 1  # no label's red
            patch[:, :, 1] = STEP * (1 + LABELS.index(says))
            image[y : y + PATCH_PX, x : x + PATCH_PX] = patch
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

    def seal(self, per_shard: int = PER_SHARD) -> Path:
        """Write the samples as shards; returns their folder."""
        root = self.folder / "shards"
        for number, start in enumerate(range(0, len(self.samples), per_shard)):
            write_shard(root, number, self.samples[start : start + per_shard], per_shard)
        Manifest(root).finish({})
        return root

    def check(self, encoder: RiggedEncoder, segmenter: RiggedSegmenter | None = None, **settings) -> dict:
        root = self.seal()
        pq.write_table(pa.Table.from_pylist(self.trusted), self.folder / "trusted.parquet")
        keys = [sample_key(row, PER_SHARD) for row in self.poisons]
        pq.write_table(pa.table({"key": pa.array(keys, pa.string())}), self.folder / "poison.parquet")
        return check(
            encoder,  # pyright: ignore[reportArgumentType]
            segmenter or RiggedSegmenter(),
            CheckData(
                root,
                LABELS,
                ("a {}",),
                trusted=self.folder / "trusted.parquet",
                truth=self.folder / "poison.parquet",
            ),
            OracleConfig(**settings),
            RepairConfig(),
            self.folder / "oracle",
        )


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()
