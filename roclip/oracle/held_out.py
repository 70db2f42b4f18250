"""Trusted images held out from model and oracle: the null of the tests, and the probes for triggers.

Letters: R images, C labels, S side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from roclip.oracle.segmenters.base import Segmenter, labels_shown, read_trusted
from roclip.storage import sha256_file


@dataclass(frozen=True)
class TrustedImages:
    """Held-out trusted images with their labels and masks."""

    images: np.ndarray
    """(R, S, S, 3) uint8."""
    shows: np.ndarray
    """(R, C) bool: the labels that each image shows."""
    masks: np.ndarray
    """(R, S, S) uint8: 0 is background, 1 + label an object."""


def load_held_out(segmenter: Segmenter, trusted: Path | None, labels: Sequence[str], size_px: int) -> TrustedImages:
    """Return the trusted images that show a label and were held out from the segmenter, resized to `size_px`.

    Returns an empty set if `trusted` is None.
    """
    if trusted is None:
        empty = np.empty((0, size_px, size_px, 3), dtype=np.uint8)
        return TrustedImages(empty, np.empty((0, len(labels)), dtype=bool), empty[..., 0])
    images, masks = read_trusted(trusted, labels, size_px)
    info = segmenter.info
    if "reference_rows" in info and info.get("trusted_sha256") == sha256_file(trusted):
        images, masks = images[info["reference_rows"]], masks[info["reference_rows"]]
    shows = labels_shown(masks, len(labels))
    images, masks, shows = (rows[shows.any(axis=1)] for rows in (images, masks, shows))
    if len(images) and images.shape[1] != size_px:
        images = np.stack([cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA) for image in images])
        masks = np.stack([cv2.resize(mask, (size_px, size_px), interpolation=cv2.INTER_NEAREST) for mask in masks])
    return TrustedImages(images, shows, masks)
