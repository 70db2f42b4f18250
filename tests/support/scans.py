"""What a pass over the data would have found, made up."""

import numpy as np

from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.statistics import Observations


def made_up(
    observations: Observations,
    areas: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    features: np.ndarray | None = None,
) -> ScanResult:
    """Of N images; keys, captions and places are numbers. Unless told otherwise the oracle sees no areas, and the model's
    scores and features are all the same."""
    total, samples = observations.seen.shape, len(observations.image)
    vectors = np.full((total[0], 8), 8**-0.5) if features is None else features
    return ScanResult(
        observations,
        np.zeros(total, dtype=np.float32) if areas is None else areas,
        sha256=[f"{n:064x}" for n in range(total[0])],
        keys=[f"{n:09d}" for n in range(samples)],
        captions=[f"caption {n}" for n in range(samples)],
        places=[("00000.tar", n) for n in range(samples)],
        size_px=64,
        unreadable=0,
        top=observations.answer[:, None].astype(np.int32),
        scores=np.ones((total[0], 1), dtype=np.float32) if scores is None else scores.astype(np.float32),
        forwards=total[0],
        _features=lambda images: vectors[images].astype(np.float16),  # pyright: ignore[reportArgumentType]
    )
