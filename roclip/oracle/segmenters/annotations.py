"""Human-annotated masks as an oracle: exact for the annotated images, without information about all others.

Letters: N images, S their side, C labels.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from roclip.errors import DataError
from roclip.oracle.segmenters.base import MIN_AREA, LabelCalibration, Segmenter, decode_masked, one_hot
from roclip.oracle.segmenters.mask_sets import MaskSet, read_masks
from roclip.oracle.segmenters.naming import match_classes

EXACT = LabelCalibration(MIN_AREA, 2 * MIN_AREA, 1.0, 1.0, 1.0, 1.0, 0, True)
UNKNOWN_SHARE = 1.5 * MIN_AREA
"""Area share of every label in an image without a mask: possibly present, so it contradicts nothing, but not certain."""
BATCH = 64


class AnnotatedSegmenter(Segmenter):
    """Human masks, looked up by the sha256 of an image's pixels at the scanned side.

    Args:
        source: A parquet of images and masks, or a folder with `images/` and `masks/` (see `mask_sets.read_masks`).
        labels: The labels of the run. A label without a class in the masks is unchecked; a class without a label is
            background.
        synonyms: Further names of the labels (`oracle.label_map`).

    Raises `DataError` as `read_masks` does, and if no class matches a label.
    """

    def __init__(self, source: Path, labels: Sequence[str], synonyms: Mapping[str, str] | None = None):
        self._set: MaskSet = read_masks(source)
        self.labels = tuple(labels)
        columns = match_classes(self._set.labels, labels, synonyms)
        self._values = np.array([0, *(0 if column is None else 1 + column for column in columns)], dtype=np.uint16)
        known = [label for column, label in enumerate(labels) if column in columns]
        if not known:
            raise DataError(
                f"{source}: expected masks of some of the labels {', '.join(labels[:12])}, got those of "
                f"{', '.join(self._set.labels[:12])}. Say in oracle.label_map which class means which label."
            )
        self.calibration = dict.fromkeys(known, EXACT)
        self.info = {
            "name": "masks drawn by people",
            "provenance": f"{len(self._set.images)} images of {source.name}; any other image is unchecked",
            "sha256": self._set.sha256,
            "licence": "that of the masks' source",
            "independent_of_clip": True,
            "calibrated": True,
            "classes": {
                label: [name for name, found in zip(self._set.labels, columns, strict=True) if found == column]
                for column, label in enumerate(labels)
                if column in columns
            },
        }
        self._found: dict[int, dict[bytes, np.ndarray]] = {}

    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        if len(images) and images.shape[1] != images.shape[2]:
            raise DataError(f"oracle: expected square images, got {images.shape[1]} by {images.shape[2]} pixels.")
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            known = self._at(batch.shape[1])
            masks = [known.get(_digest(image)) for image in batch]
            empty = np.zeros(batch.shape[1:3], dtype=np.uint16)
            maps = one_hot(np.stack([empty if mask is None else mask for mask in masks]), len(self.labels))
            maps[[mask is None for mask in masks], 1:] = UNKNOWN_SHARE
            yield maps

    def _at(self, side_px: int) -> dict[bytes, np.ndarray]:
        """Map digests of the images, decoded at this side, to their masks."""
        if side_px not in self._found:
            found = self._set
            images, masks = decode_masked(found.images, found.masks, found.labels, side_px, found.name, exact=True)
            self._found[side_px] = {
                _digest(image): mask for image, mask in zip(images, self._values[masks], strict=True)
            }
        return self._found[side_px]


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
