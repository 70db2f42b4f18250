"""The compact set that a poisoned model is repaired with: which images, under which captions, with what put on them.

Roles
    anchor     model, oracle and a caption agree: keeps the model what it is
    stamped    such a image with a found trigger on it, under its own true caption: takes the trigger its power
    repaired   a victim as it is, under a caption of what the oracle sees or takes for likeliest, with what it must not be called:
               takes the lie back

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
"""Share of the set that repaired victims take at most beside stamped images; twice as much where no trigger is found."""
EXTRA_WEIGHT = 2.0
"""Of a label that the poison is about, against the others."""
MIN_PRECISION = 0.9
"""Of the oracle on held-out trusted images, for a label that it writes captions with; lone victims get others too."""
MAX_NAMED = 3
"""Labels in a caption that the oracle writes."""

SCHEMA = pa.schema(
    [
        ("role", pa.string()),
        ("key", pa.string()),  # of the sample that the image comes from
        ("source_sha256", pa.string()),
        ("label", pa.string()),  # true label that it was chosen for
        ("caption", pa.string()),
        ("edit", pa.string()),  # what was changed: none, trigger (on the image) or caption
        ("trigger", pa.int32()),  # number of the found trigger; null without one
        ("target", pa.string()),  # label that the trigger or the lie is about; null for an anchor
        ("size_px", pa.int32()),  # side at which the images were looked at, and the trigger has its size
        ("truths", pa.list_(pa.string())),  # zero-shot prompts of the label, of a repaired victim; else none
        ("lies", pa.list_(pa.string())),  # of the target
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
    """Choose the set: at most `frac` of the distinct images, `stamped_frac` of it with a found trigger.

    Each image is in it at most once. An anchor is a image whose zero-shot answer a caption names and
    the oracle clearly sees, that no caption lies about and that is no victim. Anchors and stamped images are spread
    evenly over the labels, with `EXTRA_WEIGHT` for the targets and for what the victims truly show; a stamped image
    does not show the trigger's target. Of the victims those get a caption that clearly show only labels whose precision is at
    least `MIN_PRECISION`. A lone victim, which has no found trigger that stamped images speak for, gets one of what
    it clearly shows however precise, or else of the largest thing that may be there and that the oracle can see, if any. The
    order is lone and sure, lone, explained.

    Args:
        victims: (N,) int: the label that a victim was made to mean; -1 for all other pictures.
        labels: The C labels of `looked`.
        templates: Of the captions that the oracle writes, and of truths and lies, with one `{}`.
        calibration: Of the oracle, by label.
        targets: Labels that the model was made to say.
        explained: (N,) bool: victims with a found trigger. None is none.

    Returns:
        Rows ordered by role, label and key: a function of the arguments only.
    """
    if explained is None:
        explained = np.zeros(len(victims), dtype=bool)
    choice = _Choice(scan, victims, explained, labels, calibration, targets, seed)
    size = int(frac * len(scan.sha256))
    told = choice.repaired(int((REPAIRED_FRAC if found else 2 * REPAIRED_FRAC) * size), templates)
    stamped: list[Row] = []
    for number, trigger in enumerate(found):
        share = int(stamped_frac * size * (number + 1) / len(found)) - len(stamped)
        stamped += choice.stamped(share, number, trigger.target)
    rows = [*choice.anchors(size - len(stamped) - len(told)), *stamped, *told]
    return sorted(rows, key=lambda row: (row.role, row.label, row.key, row.trigger or 0))


def write_plan(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a parquet of `SCHEMA`; a reader sees the whole file or none."""
    write_parquet(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA))


def read_plan(path: Path) -> list[Row]:
    """What `write_plan` wrote. Raises `DataError`."""
    try:
        return [Row(**row) for row in pq.read_table(path, columns=SCHEMA.names).to_pylist()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: expected the set for a repair, got {error}. Run `roclip oracle` again: the check chooses it."
        ) from error


class _Choice:
    """Takes images one role after another, none twice."""

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
        told = np.flatnonzero(named)
        self._shown = seen.clear.copy()
        self._shown[told, victims[told]] = False  # what the lie is about, which the oracle may hold for possible
        sure = self._shown.any(axis=1) & ~(self._shown & ~precise).any(axis=1)
        alone = named & ~explained
        for n in np.flatnonzero(alone & ~self._shown.any(axis=1)):
            possible = scan.areas[n] * (seen.seen[n] & covered)
            possible[victims[n]] = 0
            self._shown[n, possible.argmax()] = possible.any()
        tellable = self.rng.permutation(np.flatnonzero(named & sure | alone & self._shown.any(axis=1)))
        self.tellable = tellable[np.lexsort((~sure[tellable], explained[tellable]))]
        affected = seen.clear[named].any(axis=0)
        self.weights = np.where(affected | np.isin(labels, targets), EXTRA_WEIGHT, 1.0)

    def anchors(self, number: int) -> list[Row]:
        return [self._row("anchor", n, "none") for n in self._spread(number, self.free)]

    def stamped(self, number: int, trigger: int, target: str) -> list[Row]:
        others = self.free & ~self.scan.observations.seen[:, list(self.labels).index(target)]
        return [self._row("stamped", n, "trigger", trigger, target) for n in self._spread(number, others)]

    def repaired(self, number: int, templates: Sequence[str]) -> list[Row]:
        rows = []
        for n in self.tellable[:number].tolist():
            clear = np.flatnonzero(self._shown[n])
            largest = clear[np.argsort(-self.scan.areas[n, clear], kind="stable")].tolist()
            named = [self.labels[int(c)] for c in largest]
            caption = templates[int(self.rng.integers(len(templates)))].format(" and ".join(named[:MAX_NAMED]))
            target = self.labels[int(self.victims[n])]
            truths, lies = ([template.format(label) for template in templates] for label in (named[0], target))
            row = self._row("repaired", n, "caption", None, target, named[0], caption)
            rows.append(replace(row, truths=truths, lies=lies))
        return rows

    def _spread(self, number: int, allowed: np.ndarray) -> list[int]:
        """Up to `number` of the allowed images, labels in turn by weight; they are no longer free."""
        answer = self.scan.observations.answer
        waiting = {
            c: list(self.rng.permutation(np.flatnonzero(allowed & (answer == c)))) for c in range(len(self.labels))
        }
        turns = [(1 / self.weights[c], c) for c, pictures in waiting.items() if pictures]
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
        """(N,) entry of `looked.captions` that names the model's answer, which the oracle clearly sees; -1 for none."""
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
