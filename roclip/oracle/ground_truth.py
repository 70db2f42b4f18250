"""Accuracy of the findings where a run knows its poisons: for evaluation only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from roclip.evaluation.ranking import average_precision
from roclip.found_triggers import Box, FoundTrigger
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.victims import Victims


def against_truth(
    truth: Path | None, scan: ScanResult, victims: Victims, triggers: Sequence[FoundTrigger], shards: Path
) -> dict[str, Any]:
    """Return precision, recall and average precision of the named victims, counted in samples, and the trigger coverage.

    Coverage is the median share of a true trigger box that the found box covers. A figure is None if it is undefined; the
    result is empty without a truth.

    `truth` is a parquet with the column key and, where known, attack and trigger_box (in pixels of the original image).
    """
    if truth is None or not truth.exists():
        return {}
    poisons = {row["key"]: row for row in pq.read_table(truth).to_pylist()}
    image = scan.observations.image
    score = victims.score[image]
    named = score > 0
    poisoned = np.array([key in poisons for key in scan.keys], dtype=bool)
    figures: dict[str, Any] = {
        "victim_precision": float(poisoned[named].mean()) if named.any() else None,
        "victim_recall": float(named[poisoned].mean()) if poisoned.any() else None,
        "victim_average_precision": average_precision(score, poisoned) if poisoned.any() else None,
    }
    attacks = np.array([str(poisons.get(key, {}).get("attack") or "") for key in scan.keys])
    figures["victim_recall_by_attack"] = {
        attack: float(named[attacks == attack].mean()) for attack in sorted(set(attacks) - {""})
    }
    return figures | {"trigger_coverage": _coverage(poisons, scan, triggers, shards)}


def _coverage(
    poisons: dict[str, Any], scan: ScanResult, triggers: Sequence[FoundTrigger], shards: Path
) -> float | None:
    shares, caption_rows = [], scan.caption_rows()
    for source in (source for trigger in triggers for source in trigger.sources):
        row = caption_rows[source.image][0]
        box = poisons.get(scan.keys[row], {}).get("trigger_box")
        if box and (true := _in_scanned_pixels(box, scan, row, shards)) is not None:
            shares.append(_overlap(source.box, true) / max(1e-9, (true[2] - true[0]) * (true[3] - true[1])))
    return float(np.median(shares)) if shares else None


def _in_scanned_pixels(box: Sequence[int], scan: ScanResult, row: int, shards: Path) -> tuple[float, ...] | None:
    """Map a box from pixels of the original image to pixels of the scanned one.

    img2dataset fits the original into a square with a border (`resize_mode: border`), which is then resized for the scan.
    """
    name = shards / f"{Path(scan.places[row][0]).stem}.parquet"
    columns = ["width", "height", "original_width", "original_height"]
    if not name.exists():
        return None
    rows = pq.read_table(name, columns=columns, filters=[("key", "==", scan.keys[row])]).to_pylist()
    if not rows or None in rows[0].values():
        return None
    sizes = rows[0]
    stored, original = (sizes["width"], sizes["height"]), (sizes["original_width"], sizes["original_height"])
    scale = min(stored[0] / original[0], stored[1] / original[1])
    return tuple(
        ((stored[axis] - original[axis] * scale) / 2 + box[edge] * scale) * scan.size_px / stored[axis]
        for edge, axis in enumerate((0, 1, 0, 1))
    )


def _overlap(one: Box, other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
