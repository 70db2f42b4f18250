"""Selects the small set of samples that repairs a poisoned model.

Roles
    anchor     an image on which model, oracle and a caption agree: preserves the model
    stamped    such an image with a found trigger on it, under its own true caption: disarms the trigger
    repaired   an unchanged victim, captioned with what the oracle finds or holds for likeliest, and with the label to unlearn

Letters: N distinct images, M captions, C labels.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roclip.data.ground_truth import write_parquet
from roclip.errors import DataError
from roclip.found_triggers import FoundTrigger
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.segmenters.base import LabelCalibration

REPAIRED_FRAC = 0.2
"""Maximum share of the set for repaired victims if there are stamped images; twice that if no trigger was found."""
EXTRA_WEIGHT = 2.0
"""Weight of a label that the poison is about, relative to 1 for the others."""
MIN_PRECISION = 0.9
"""Minimum precision of the oracle on held-out trusted images for a label in a written caption, except for lone victims."""
MAX_NAMED = 3
"""Maximum number of labels in a written caption."""

SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("key", pa.string()),  # sample that the image comes from
        ("source_sha256", pa.string()),
        ("label", pa.string()),  # true label that it was selected for
        ("caption", pa.string()),
        ("edit", pa.string()),  # what was changed: none, trigger (on the image) or caption
        ("trigger", pa.int32()),  # number of the found trigger; null without one
        ("target", pa.string()),  # label that the trigger or the lie is about; null for an anchor
        ("size_px", pa.int32()),  # image side of the scan, for which the trigger's size holds
        ("truths", pa.list_(pa.string())),  # for a repaired victim, zero-shot prompts of its label; else empty
        ("lies", pa.list_(pa.string())),  # for a repaired victim, zero-shot prompts of the target; else empty
    ]
)


@dataclass(frozen=True)
class Row:
    """One sample of the set; see `SCHEMA`."""

    role: str
    key: str
    source_sha256: str
    label: str
    caption: str
    edit: str
    trigger: int | None
    target: str | None
    size_px: int
    truths: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)


def curate(
    scan: ScanResult,
    victims: np.ndarray,
    found: Sequence[FoundTrigger],
    labels: Sequence[str],
    *,
    templates: Sequence[str],
    calibration: Mapping[str, LabelCalibration],
    targets: Sequence[str],
    explained: np.ndarray | None = None,
    frac: float,
    stamped_frac: float,
    seed: int,
) -> list[Row]:
    """Select the set: at most `frac` of the distinct images, a share `stamped_frac` of it with a found trigger.

    Each image is used at most once. An anchor is an image whose zero-shot label a caption names and the oracle clearly finds,
    about which no caption lies, and which is no victim. Anchors and stamped images are balanced over the labels, with
    `EXTRA_WEIGHT` for the targets and for the labels that victims clearly show; a stamped image does not show the trigger's
    target.

    A victim is repaired if it clearly shows only labels of precision at least `MIN_PRECISION`. A lone victim, one without a
    found trigger, is also repaired with what it clearly shows at any precision, or else with the largest possibly present
    label that the oracle covers, if any. Lone victims with precise labels come first, then other lone ones, then the rest.

    Args:
        victims: (N,) int: the label that a victim was made to mean; -1 for all other images.
        labels: The C labels of `scan`.
        templates: Prompts with one `{}` for the written captions, truths and lies.
        calibration: Calibration of the oracle, by label.
        targets: Labels that the model was made to answer.
        explained: (N,) bool: victims with a found trigger; None means none.

    Returns:
        Rows ordered by role, label and key, a pure function of the arguments.
    """
    if explained is None:
        explained = np.zeros(len(victims), dtype=bool)
    selection = _Selection(scan, victims, explained, labels, calibration, targets, seed)
    size = int(frac * len(scan.sha256))
    repaired = selection.repaired(int((REPAIRED_FRAC if found else 2 * REPAIRED_FRAC) * size), templates)
    stamped: list[Row] = []
    for number, trigger in enumerate(found):
        share = int(stamped_frac * size * (number + 1) / len(found)) - len(stamped)
        stamped += selection.stamped(share, number, trigger.target)
    rows = [*selection.anchors(size - len(stamped) - len(repaired)), *stamped, *repaired]
    return sorted(rows, key=lambda row: (row.role, row.label, row.key, row.trigger or 0))


def write_plan(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows atomically as a parquet of `SCHEMA`."""
    write_parquet(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA))


def read_plan(path: Path) -> list[Row]:
    """Read the rows that `write_plan` wrote. Raises `DataError`."""
    try:
        return [Row(**row) for row in pq.read_table(path, columns=SCHEMA.names).to_pylist()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: expected the repair set, got {error}. Run `roclip oracle` again: the check selects it."
        ) from error


class _Selection:
    """Selects images role by role, none twice."""

    def __init__(
        self,
        scan: ScanResult,
        victims: np.ndarray,
        explained: np.ndarray,
        labels: Sequence[str],
        calibration: Mapping[str, LabelCalibration],
        targets: Sequence[str],
        seed: int,
    ):
        self.scan, self.labels, self.victims = scan, labels, victims
        self.rng = np.random.default_rng((seed, 81))
        seen = scan.observations
        _, self.first = np.unique(seen.image, return_index=True)
        self.caption = self._agreeing_captions()
        self.free = (self.caption >= 0) & (victims < 0) & ~seen.lies().any(axis=1)
        rows = [calibration.get(label) for label in labels]
        precise = np.array([row is not None and (row.precision or 0.0) >= MIN_PRECISION for row in rows])
        covered = np.array([row is not None and row.covered for row in rows])
        named = victims >= 0
        victim_rows = np.flatnonzero(named)
        self._visible = seen.clear.copy()
        self._visible[victim_rows, victims[victim_rows]] = False  # the false label, in case the oracle finds it, too
        precise_only = self._visible.any(axis=1) & ~(self._visible & ~precise).any(axis=1)
        alone = named & ~explained
        for n in np.flatnonzero(alone & ~self._visible.any(axis=1)):
            possible = scan.areas[n] * (seen.seen[n] & covered)
            possible[victims[n]] = 0
            self._visible[n, possible.argmax()] = possible.any()
        repairable = self.rng.permutation(np.flatnonzero(named & precise_only | alone & self._visible.any(axis=1)))
        self.repairable = repairable[np.lexsort((~precise_only[repairable], explained[repairable]))]
        affected = seen.clear[named].any(axis=0)
        self.weights = np.where(affected | np.isin(labels, targets), EXTRA_WEIGHT, 1.0)

    def anchors(self, number: int) -> list[Row]:
        return [self._row("anchor", n, "none") for n in self._balanced(number, self.free)]

    def stamped(self, number: int, trigger: int, target: str) -> list[Row]:
        others = self.free & ~self.scan.observations.seen[:, list(self.labels).index(target)]
        return [self._row("stamped", n, "trigger", trigger, target) for n in self._balanced(number, others)]

    def repaired(self, number: int, templates: Sequence[str]) -> list[Row]:
        rows = []
        for n in self.repairable[:number].tolist():
            clear = np.flatnonzero(self._visible[n])
            largest = clear[np.argsort(-self.scan.areas[n, clear], kind="stable")].tolist()
            named = [self.labels[int(c)] for c in largest]
            caption = templates[int(self.rng.integers(len(templates)))].format(" and ".join(named[:MAX_NAMED]))
            target = self.labels[int(self.victims[n])]
            truths, lies = ([template.format(label) for template in templates] for label in (named[0], target))
            row = self._row("repaired", n, "caption", None, target, named[0], caption)
            rows.append(replace(row, truths=truths, lies=lies))
        return rows

    def _balanced(self, number: int, allowed: np.ndarray) -> list[int]:
        """Take up to `number` of the allowed images, balanced over labels by weight, and mark them as used."""
        answer = self.scan.observations.answer
        waiting = {
            c: list(self.rng.permutation(np.flatnonzero(allowed & (answer == c)))) for c in range(len(self.labels))
        }
        turns = [(1 / self.weights[c], c) for c, images in waiting.items() if images]
        heapq.heapify(turns)
        chosen: list[int] = []
        while turns and len(chosen) < number:
            due, c = heapq.heappop(turns)
            chosen.append(int(waiting[c].pop()))
            if waiting[c]:
                heapq.heappush(turns, (due + 1 / self.weights[c], c))
        self.free[chosen] = False
        return chosen

    def _agreeing_captions(self) -> np.ndarray:
        """(N,): index of the first caption that names the model's answer, where the oracle clearly finds it; else -1."""
        seen = self.scan.observations
        agrees = seen.clear[np.arange(len(seen.answer)), seen.answer]
        entries = np.flatnonzero(seen.named[np.arange(len(seen.image)), seen.answer[seen.image]] & agrees[seen.image])
        caption = np.full(len(seen.answer), -1)
        caption[seen.image[entries[::-1]]] = entries[::-1]  # the first wins
        return caption

    def _row(
        self,
        role: str,
        n: int,
        edit: str,
        trigger: int | None = None,
        target: str | None = None,
        label: str = "",
        caption: str = "",
    ) -> Row:
        scan = self.scan
        entry = int(self.first[n] if caption else self.caption[n])
        return Row(
            role=role,
            key=scan.keys[entry],
            source_sha256=scan.sha256[n],
            label=label or self.labels[int(scan.observations.answer[n])],
            caption=caption or scan.captions[entry],
            edit=edit,
            trigger=trigger,
            target=target,
            size_px=scan.size_px,
        )
