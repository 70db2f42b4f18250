"""The interface of an oracle: a segmenter with per-label calibration and provenance.

An oracle implements `maps`; areas, masks and regions are derived from them here, the same way for every oracle. It shares
no weights or data with the model that it judges. A label that it does not segment well enough is unchecked, which never
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
"""Area share below which an object is not expected to be found."""
UNMEASURED_AREA = 0.01
"""Threshold of area share for a label whose accuracy was not measured on trusted images."""
SEEN_RECALL, CLEAR_PRECISION = 0.95, 0.9
"""Targets on held-out trusted images by which the `seen` and `clear` thresholds of a label are set."""
MIN_RECALL, MIN_SPECIFICITY, MIN_EXAMPLES = 0.9, 0.6, 10
"""A label that misses any of these minimums is unchecked."""


@dataclass(frozen=True)
class LabelCalibration:
    """Accuracy of the oracle for one label on held-out trusted images; None if not measured."""

    seen: float
    """Area share from which the label is possibly present; a share `recall` of the images that show it reach this."""
    clear: float
    """Area share from which it is certainly present; a share `precision` of the images that reach this show it."""
    recall: float | None
    specificity: float | None
    """Share of the images without the label that stay below `seen`."""
    precision: float | None
    clear_recall: float | None
    examples: int
    """Number of held-out images that show the label."""
    covered: bool


UNMEASURED = LabelCalibration(UNMEASURED_AREA, UNMEASURED_AREA, None, None, None, None, 0, True)


@dataclass(frozen=True, eq=False)
class Region:
    """One connected object found by the oracle."""

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
    """An oracle. `maps` is a pure function of each image, independent of its batch."""

    labels: tuple[str, ...]
    calibration: dict[str, LabelCalibration]
    """Calibration of every label that the oracle has a class for."""
    info: dict[str, Any]
    """Keys: name, provenance, sha256 (of the weights), licence, independent_of_clip, calibrated (whether the thresholds were
    measured on trusted images); optionally trusted_sha256 and reference_rows (rows of that set held out from training)."""

    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        """Yield batches of class probabilities (n, 1 + C, h, w) on the CPU, background first, for images (N, H, W, 3) uint8."""
        ...

    def areas(self, images: np.ndarray) -> np.ndarray:
        """Return area shares (N, C), the mean of each label's map, for images (N, H, W, 3) uint8."""
        shares = [maps[:, 1:].mean(dim=(2, 3)) for maps in self.maps(images)]
        return torch.cat(shares).numpy() if shares else np.empty((0, len(self.labels)), dtype=np.float32)

    def masks(self, images: np.ndarray) -> np.ndarray:
        """Return masks (N, H, W) for images (N, H, W, 3) uint8: 0 is background, 1 + labels.index(label) an object.

        The dtype is uint8, or uint16 for 256 labels or more.
        """
        dtype, size = np.uint8 if len(self.labels) < 256 else np.uint16, images.shape[1:3]
        masks = [_enlarged(maps, size).argmax(dim=1).numpy().astype(dtype) for maps in self.maps(images)]
        return np.concatenate(masks) if masks else np.empty((0, *size), dtype=dtype)

    def regions(self, images: np.ndarray) -> list[list[Region]]:
        """Return for each image (N, H, W, 3) uint8 its regions of at least `MIN_AREA`, largest first."""
        size = images.shape[1:3]
        return [_regions(maps, self.labels) for batch in self.maps(images) for maps in _enlarged(batch, size)]

    def query(self, images: np.ndarray, labels: Sequence[str]) -> list[dict[str, Region | None]]:
        """Return for each image the largest region of each label, or None if there is no region.

        Raises `DataError` for a label that the oracle does not cover, because None would mean nothing there.
        """
        if blind := [label for label in labels if not self.covers(label)]:
            raise DataError(f"oracle: expected labels that it covers, got {', '.join(blind)}. They are unchecked.")
        answers = []
        for regions in self.regions(images):
            largest = {region.label: region for region in reversed(regions)}
            answers.append({label: largest.get(label) for label in labels})
        return answers

    def covers(self, label: str) -> bool:
        """Whether the oracle segments this label well enough to contradict a model or a caption."""
        return label in self.calibration and self.calibration[label].covered


def one_hot(masks: np.ndarray, classes: int) -> Tensor:
    """Return one-hot maps (N, 1 + C, H, W) of masks (N, H, W)."""
    return F.one_hot(torch.from_numpy(masks.astype(np.int64)), 1 + classes).permute(0, 3, 1, 2).float()


def with_background(evidence: Tensor) -> Tensor:
    """Turn independent evidence for each label, e (n, C, h, w) in [0, 1], into maps (n, 1 + C, h, w) that sum to 1.

    Background gets 1 - max e; each label gets a share of max e in proportion to its e.
    """
    best = evidence.amax(dim=1, keepdim=True)
    return torch.cat([1 - best, evidence * (best / evidence.sum(dim=1, keepdim=True).clamp_min(1e-9))], dim=1)


def _enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def _regions(maps: Tensor, labels: Sequence[str]) -> list[Region]:
    """Connected components of the argmax of maps (1 + C, H, W)."""
    winner, found = maps.argmax(dim=0).numpy(), []
    for value in np.unique(winner[winner > 0]):
        of_label = (winner == value).astype(np.uint8)
        number, parts, stats, _ = cv2.connectedComponentsWithStats(of_label, connectivity=8)
        for part in range(1, number):
            left, top, width, height, pixels = (int(count) for count in stats[part])
            if pixels >= MIN_AREA * winner.size:
                mask = parts == part
                score = float(maps[int(value)].numpy()[mask].mean())
                box = (left, top, left + width, top + height)
                found.append(Region(labels[int(value) - 1], score, pixels / winner.size, box, mask))
    return sorted(found, key=lambda region: (-region.area, region.box))


# ---- calibration -------------------------------------------------------------------------------------------


def calibrate(segmenter: Segmenter, images: np.ndarray, masks: np.ndarray) -> dict[str, LabelCalibration]:
    """Choose both thresholds of every label on held-out trusted images, and measure recall, specificity and precision."""
    areas, truth = segmenter.areas(images), labels_shown(masks, len(segmenter.labels))
    return {label: _calibrate(areas[:, c], truth[:, c]) for c, label in enumerate(segmenter.labels)}


def calibrate_on(segmenter: Segmenter, trusted: Path, frac: float, seed: int) -> None:
    """Calibrate an oracle that was trained elsewhere on a seeded share `frac` of a trusted set, and record those rows.

    Labels without a class in the oracle stay unchecked. Raises `DataError` as `read_trusted` does.
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
    present, absent = areas[truth], areas[~truth]
    if not len(present) or not len(absent):
        return LabelCalibration(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, len(present), False)
    seen = float(np.quantile(present, 1 - SEEN_RECALL, method="lower"))
    candidates = np.sort(areas)[::-1]
    hits = np.cumsum(truth[np.argsort(-areas, kind="stable")]) / np.arange(1, len(areas) + 1)
    precise = np.flatnonzero(hits >= CLEAR_PRECISION)
    at = int(precise[-1]) if len(precise) else 0
    clear = max(float(candidates[at]), seen)
    recall, specificity = float((present >= seen).mean()), float((absent < seen).mean())
    covered = recall >= MIN_RECALL and specificity >= MIN_SPECIFICITY and len(present) >= MIN_EXAMPLES
    return LabelCalibration(
        seen=seen,
        clear=clear,
        recall=recall,
        specificity=specificity,
        precision=float(truth[areas >= clear].mean()) if (areas >= clear).any() else 0.0,
        clear_recall=float((present >= clear).mean()),
        examples=len(present),
        covered=bool(covered),
    )


def labels_shown(masks: np.ndarray, classes: int) -> np.ndarray:
    """Return (N, C) bool for masks (N, H, W) of class indices: which labels cover at least `MIN_AREA` of each image."""
    flat = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    return np.stack([(flat == 1 + c).mean(axis=1) >= MIN_AREA for c in range(classes)], axis=1)


def mean_iou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Return intersection over union, averaged over background and all labels present in `truth`."""
    scores = [
        ((predicted == c) & (truth == c)).sum() / max(1, ((predicted == c) | (truth == c)).sum())
        for c in range(classes + 1)
        if (truth == c).any()
    ]
    return float(np.mean(scores))


# ---- trusted images -----------------------------------------------------------------------------------------


def read_trusted(trusted: Path, labels: Sequence[str], max_side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Read images (N, S, S, 3) uint8 and masks (N, S, S) from a parquet with columns image (encoded) and mask (PNG of class
    indices, 0 for background).

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
    """Decode images and masks as `read_trusted` does; `exact` means exactly `side_px` instead of at most.

    Raises `DataError` that names their source, `where`.
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
    """Decode an image of class indices to (size, size) uint16, resized with nearest-neighbour interpolation."""
    with Image.open(io.BytesIO(encoded), formats=("PNG", "GIF", "BMP")) as mask:
        classes = np.asarray(mask.resize((size, size), Image.Resampling.NEAREST))
    if classes.ndim != 2:
        raise ValueError(f"a mask of {classes.shape[2]} channels instead of class indices")
    return classes.astype(np.uint16)
