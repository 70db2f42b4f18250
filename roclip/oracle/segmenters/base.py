"""What an oracle is: it says what an image shows and where, how well it sees each label, and where it comes from.

An oracle defines `maps`; areas, masks and regions follow from them here, the same way for every oracle. It shares nothing
with the model that it judges. What it cannot see well enough it says so about: such a label is unchecked, it never
counts as agreement.

Letters: N images, C labels, H and W height and width in pixels, h and w those of the maps, S side of trusted images.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from roclip.data.reader import decode
from roclip.errors import DataError
from roclip.storage import sha256_file

MIN_AREA = 0.005
"""An object under this share of the image is not expected to be seen."""
UNMEASURED_AREA = 0.01
"""Share from which on a label counts as seen where no trusted image says how well the oracle sees it."""
SEEN_RECALL, CLEAR_PRECISION = 0.95, 0.9
"""What the two thresholds of a label are set for, on held-out trusted images."""
MIN_RECALL, MIN_SPECIFICITY, MIN_EXAMPLES = 0.9, 0.6, 10
"""A label with less is unchecked."""


@dataclass(frozen=True)
class LabelCalibration:
    """How well the oracle sees one label on trusted images that it did not learn from; None is not measured."""

    seen: float
    """Area share from which on the label may be there: `recall` of the images that show it reach this."""
    clear: float
    """Area share from which on it certainly is: `precision` of the images that reach this show it."""
    recall: float | None
    specificity: float | None
    """Share of the images without the label that stay under `seen`."""
    precision: float | None
    clear_recall: float | None
    examples: int
    """Held-out images that show the label."""
    covered: bool


UNMEASURED = LabelCalibration(UNMEASURED_AREA, UNMEASURED_AREA, None, None, None, None, 0, True)


@dataclass(frozen=True, eq=False)
class Region:
    """One connected thing that the oracle sees."""

    label: str
    score: float
    """Mean of the label's map over the region, 0 to 1."""
    area: float
    """Share of the image."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the image; right and bottom are the first outside."""
    mask: np.ndarray
    """(H, W) bool."""


class Segmenter(Protocol):
    """An oracle; `maps` is a pure function of the images, one by one."""

    labels: tuple[str, ...]
    calibration: dict[str, LabelCalibration]
    """Of the labels that it knows at all."""
    info: dict[str, Any]
    """name, provenance, sha256 (of the weights), licence, independent_of_clip, calibrated (were the thresholds measured on
    trusted images?). May hold trusted_sha256 and reference_rows (rows of that set which it did not learn from)."""

    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        """(N, H, W, 3) uint8 to batches of (n, 1 + C, h, w), on the CPU: how much each pixel is background or a label."""
        ...

    def areas(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, C): the mean of each label's map, the share of the image's area that it covers."""
        shares = [maps[:, 1:].mean(dim=(2, 3)) for maps in self.maps(images)]
        return torch.cat(shares).numpy() if shares else np.empty((0, len(self.labels)), dtype=np.float32)

    def masks(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, H, W): 0 background, 1 + labels.index(label) an object; uint8, or uint16 for 256
        labels or more."""
        dtype, size = np.uint8 if len(self.labels) < 256 else np.uint16, images.shape[1:3]
        masks = [_enlarged(maps, size).argmax(dim=1).numpy().astype(dtype) for maps in self.maps(images)]
        return np.concatenate(masks) if masks else np.empty((0, *size), dtype=dtype)

    def regions(self, images: np.ndarray) -> list[list[Region]]:
        """For each image (N, H, W, 3) uint8 its regions of at least `MIN_AREA`, the largest first."""
        size = images.shape[1:3]
        return [_regions(maps, self.labels) for batch in self.maps(images) for maps in _enlarged(batch, size)]

    def query(self, images: np.ndarray, labels: Sequence[str]) -> list[dict[str, Region | None]]:
        """For each image the largest region of each of these labels, None where it sees none.

        Raises `DataError` for a label that it does not cover: that it sees none would say nothing.
        """
        if blind := [label for label in labels if not self.covers(label)]:
            raise DataError(f"oracle: expected labels that it covers, got {', '.join(blind)}. They are unchecked.")
        answers = []
        for regions in self.regions(images):
            largest = {region.label: region for region in reversed(regions)}
            answers.append({label: largest.get(label) for label in labels})
        return answers

    def covers(self, label: str) -> bool:
        """Whether the oracle sees this label well enough to contradict anybody about it."""
        return label in self.calibration and self.calibration[label].covered


def one_hot(masks: np.ndarray, classes: int) -> Tensor:
    """Maps (N, 1 + C, H, W) of masks (N, H, W) that are certain of every pixel."""
    return F.one_hot(torch.from_numpy(masks.astype(np.int64)), 1 + classes).permute(0, 3, 1, 2).float()


def with_background(evidence: Tensor) -> Tensor:
    """Maps (n, 1 + C, h, w) out of what speaks for each label by itself, (n, C, h, w) in [0, 1]: all of a pixel that its
    best label leaves is background, and the labels share the rest."""
    best = evidence.amax(dim=1, keepdim=True)
    return torch.cat([1 - best, evidence * (best / evidence.sum(dim=1, keepdim=True).clamp_min(1e-9))], dim=1)


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _regions(maps: Tensor, labels: Sequence[str]) -> list[Region]:
    """Connected parts of the mask of maps (1 + C, H, W)."""
    winner, found = maps.argmax(dim=0).numpy(), []
    for value in np.unique(winner[winner > 0]):
        here = (winner == value).astype(np.uint8)
        number, parts, stats, _ = cv2.connectedComponentsWithStats(here, connectivity=8)
        for part in range(1, number):
            left, top, width, height, pixels = (int(count) for count in stats[part])
            if pixels >= MIN_AREA * winner.size:
                mask = parts == part
                score = float(maps[int(value)].numpy()[mask].mean())
                box = (left, top, left + width, top + height)
                found.append(Region(labels[int(value) - 1], score, pixels / winner.size, box, mask))
    return sorted(found, key=lambda region: (-region.area, region.box))


# ---- how well it sees ---------------------------------------------------------------------------------------


def calibrate(segmenter: Segmenter, images: np.ndarray, masks: np.ndarray) -> dict[str, LabelCalibration]:
    """Set both thresholds of every label on trusted images that it did not learn from, and measure what they are worth."""
    areas, truth = segmenter.areas(images), shown(masks, len(segmenter.labels))
    return {label: _calibrate(areas[:, c], truth[:, c]) for c, label in enumerate(segmenter.labels)}


def calibrate_on(segmenter: Segmenter, trusted: Path, frac: float, seed: int) -> None:
    """Calibrate an oracle that has learned from other images on a seeded share of a trusted set, and note which rows.

    Labels that it has no class for stay unknown to it. Raises `DataError` as `read_trusted` does.
    """
    images, masks = read_trusted(trusted, segmenter.labels, CALIBRATION_SIDE_PX)
    rows = np.sort(np.random.default_rng((seed, 61)).permutation(len(images))[: round(frac * len(images))])
    measured = calibrate(segmenter, images[rows], masks[rows])
    segmenter.calibration = {label: measured[label] for label in segmenter.calibration}
    segmenter.info |= {
        "calibrated": True,
        "trusted_sha256": sha256_file(trusted),
        "reference_rows": [int(row) for row in rows],
    }


CALIBRATION_SIDE_PX = 512


def _calibrate(areas: np.ndarray, truth: np.ndarray) -> LabelCalibration:
    there, not_there = areas[truth], areas[~truth]
    if not len(there) or not len(not_there):
        return LabelCalibration(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, len(there), False)
    seen = float(np.quantile(there, 1 - SEEN_RECALL, method="lower"))
    candidates = np.sort(areas)[::-1]
    hits = np.cumsum(truth[np.argsort(-areas, kind="stable")]) / np.arange(1, len(areas) + 1)
    precise = np.flatnonzero(hits >= CLEAR_PRECISION)
    at = int(precise[-1]) if len(precise) else 0
    clear = max(float(candidates[at]), seen)
    recall, specificity = float((there >= seen).mean()), float((not_there < seen).mean())
    covered = recall >= MIN_RECALL and specificity >= MIN_SPECIFICITY and len(there) >= MIN_EXAMPLES
    return LabelCalibration(
        seen=seen,
        clear=clear,
        recall=recall,
        specificity=specificity,
        precision=float(truth[areas >= clear].mean()) if (areas >= clear).any() else 0.0,
        clear_recall=float((there >= clear).mean()),
        examples=len(there),
        covered=bool(covered),
    )


def shown(masks: np.ndarray, classes: int) -> np.ndarray:
    """(N, H, W) class indices to (N, C) bool: which labels cover at least `MIN_AREA` of an image."""
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    return np.stack([(flat == 1 + c).mean(axis=1) >= MIN_AREA for c in range(classes)], axis=1)


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Intersection over union, averaged over background and all labels that occur."""
    scores = [
        ((predicted == c) & (truth == c)).sum() / max(1, ((predicted == c) | (truth == c)).sum())
        for c in range(classes + 1)
        if (truth == c).any()
    ]
    return float(np.mean(scores))


# ---- trusted images -----------------------------------------------------------------------------------------


def read_trusted(trusted: Path, labels: Sequence[str], max_side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) uint8 and masks (N, S, S) of a parquet with the columns image (encoded) and mask (PNG of class
    indices, 0 background).

    S is the side of the first image, rounded down to a multiple of 32, and at most `max_side_px`.
    """
    try:
        table = pq.read_table(trusted, columns=["image", "mask"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{trusted}: expected a parquet with columns image and mask, got {error}.") from error
    if not len(table):
        raise DataError(f"{trusted}: expected trusted images, got none. Raise oracle.trusted.")
    return decode_masked(table["image"].to_pylist(), table["mask"].to_pylist(), labels, max_side_px, str(trusted))


def decode_masked(
    images: Sequence[bytes],
    masks: Sequence[bytes],
    labels: Sequence[str],
    side_px: int,
    where: str,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Encoded images and masks to pixels, as `read_trusted` does, or `exact` at this side, which is then no maximum.

    Raises `DataError` that names `where` they are from.
    """
    try:
        with Image.open(io.BytesIO(images[0])) as first:
            size = side_px if exact else max(32, min(side_px, max(first.size)) // 32 * 32)
        pixels = np.stack([decode(encoded, size) for encoded in images])
        classes = np.stack([decode_mask(encoded, size) for encoded in masks])
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: expected images and masks that can be decoded, got {error}.") from error
    if classes.max() > len(labels):
        raise DataError(
            f"{where}: expected mask values 0 to {len(labels)} (background and {len(labels)} labels), got "
            f"{classes.max()}. Were the masks written for another list of labels?"
        )
    return pixels, classes if len(labels) > 255 else classes.astype(np.uint8)


def decode_mask(encoded: bytes, size: int) -> np.ndarray:
    """An encoded image of class indices to (size, size) uint16, no index between two others made up."""
    with Image.open(io.BytesIO(encoded), formats=("PNG", "GIF", "BMP")) as mask:
        classes = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))
    if classes.ndim != 2:
        raise ValueError(f"a mask of {classes.shape[2]} channels instead of class indices")
    return classes.astype(np.uint16)
