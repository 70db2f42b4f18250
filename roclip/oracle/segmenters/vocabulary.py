"""Maps the classes of an oracle to the labels of a run.

Letters: C labels of the run, K classes of the oracle, n images of a batch, h and w height and width of the maps.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from roclip.errors import DataError
from roclip.oracle.segmenters.base import UNMEASURED, Segmenter
from roclip.oracle.segmenters.naming import match_classes


class Relabelled(Segmenter):
    """Segmenter `inner` with its classes mapped to labels.

    A label's map is the sum of the maps of its classes; a class without a label is background; a label without a class is
    unchecked. A label of exactly one class keeps the class's thresholds; a label of several classes gets the uncalibrated
    defaults. Raises `DataError` if no class matches a label, `ConfigError` for a synonym of no label.
    """

    def __init__(self, inner: Segmenter, labels: Sequence[str], synonyms: Mapping[str, str] | None = None):
        self.inner, self.labels = inner, tuple(labels)
        columns = match_classes(inner.labels, labels, synonyms)
        self._classes = [[k for k, column in enumerate(columns) if column == c] for c in range(len(labels))]
        self._others = [0, *(1 + k for k, column in enumerate(columns) if column is None)]
        if not any(self._classes):
            raise DataError(
                f"oracle: expected one that knows any of {_shortened(labels)}; {inner.info['name']} knows "
                f"{_shortened(inner.labels)}. "
                "Map its classes to labels in oracle.label_map, or use another oracle."
            )
        self.calibration = {
            label: inner.calibration.get(inner.labels[classes[0]], UNMEASURED) if len(classes) == 1 else UNMEASURED
            for label, classes in zip(self.labels, self._classes, strict=True)
            if classes
        }
        measured = all(row is not UNMEASURED for row in self.calibration.values())
        self.info = {
            **inner.info,
            "calibrated": bool(inner.info.get("calibrated")) and measured,
            "classes": {
                label: [inner.labels[k] for k in classes]
                for label, classes in zip(self.labels, self._classes, strict=True)
                if classes
            },
        }

    def maps(self, images: np.ndarray) -> Iterator[Tensor]:
        for maps in self.inner.maps(images):
            columns = [maps[:, self._others].amax(dim=1)]
            columns += [maps[:, [1 + k for k in classes]].sum(dim=1) for classes in self._classes]
            yield torch.stack(columns, dim=1)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
