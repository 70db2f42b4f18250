"""The state of one training, read from the files in its folder: steps, evaluations, ranks, checkpoints."""

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from roclip.metrics.registry import METRICS
from roclip.report.curves import SHARES
from roclip.report.thinning import Thinned
from roclip.report.watched_files import WatchedFiles

CURVES = (
    "loss",
    "samples_per_s",
    "data_wait_frac",
    "grad_norm",
    "pool_similarity",
    "pool_own",
    "pool_duplicates",
    "pool_staleness",
    "pool_entropy",
    "agreement",
    "suspected",
)
"""Metrics that are kept as curves over the training."""
LOG = "log/ranks.log"
"""In a training's folder: what happened to its ranks, one line each."""
CAUSE = "failure.txt"
"""In a training's folder: why the ranks last ended."""
_SPANS, _EVENTS, _ATTACKS, _RANKS = 400, 50, 12, 4096
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MetricCurve:
    """A metric over the epochs done, thinned."""

    means: Points
    reach: Points = ()
    """Minimum and maximum that each of `means` stands for; empty if each stands for a single value."""
    last: float = 0.0


@dataclass(frozen=True)
class RankEvent:
    """A line of the ranks' log."""

    when: str
    text: str


@dataclass(frozen=True)
class SavedCheckpoints:
    """The checkpoints that a training has written so far: rows of `checkpoints/saves.jsonl`."""

    count: int = 0
    last: Mapping[str, Any] = field(default_factory=dict)
    last_copied: Mapping[str, Any] = field(default_factory=dict)
    """The last one that should go to `train.checkpoint_store`."""
    failed_copies: int = 0


@dataclass(frozen=True)
class TrainingState:
    """One training."""

    name: str
    row: Mapping[str, float] = field(default_factory=dict)
    """The finite numbers of the last logged step, by their names in `roclip.metrics.registry`."""
    newest: Mapping[str, Any] = field(default_factory=dict)
    """The newest value of every metric, as it was logged."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Sums over all logged steps, for the metrics that are `summed`."""
    phase: str = ""
    last_update_s: float | None = None
    """When the last step was logged, in seconds since 1970."""
    last_written_s: float | None = None
    """When a step or an event of the ranks was last logged."""
    share_read: float = 1.0
    """Share of metrics.jsonl that has been read so far."""
    curves: Mapping[str, MetricCurve] = field(default_factory=dict)
    matched: Points = ()
    """(start, end) in epochs of the matched periods."""
    poisons_seen: int = 0
    """Poisoned images in the logged matched steps, by the ground truth."""
    poisons_met: int = 0
    step_s_p50: tuple[float, ...] = ()
    """By rank."""
    step_s_p99: tuple[float, ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Rows of evaluations.jsonl, reduced to what was checked to be a number."""
    events: tuple[RankEvent, ...] = ()
    """The last ones."""
    event_count: int = 0
    ranks: int | None = None
    starts: int = 0
    restarts: int = 0
    failure: str = ""
    """Why the training ended for good, or why it waits for a restart."""
    checkpoints: SavedCheckpoints = SavedCheckpoints()
    latest: str = ""
    trusted: str = ""
    left_out: tuple[str, ...] = ()
    """Steps that diverged, each as a sentence."""

    @property
    def progress(self) -> float:
        """Epochs done."""
        return self.row.get("progress", 0.0)


class TrainingReader:
    """Reads the folder of a training again and again; each read costs only what is new.

    Args:
        files: The files of the run.
        name: The folder's name in the run, such as `roclip`.
    """

    def __init__(self, files: WatchedFiles, name: str):
        self.files, self.name = files, name
        self._steps = files.tail(f"{name}/metrics.jsonl")
        self._log = files.tail(f"{name}/{LOG}", _event)
        self._saves = files.tail(f"{name}/checkpoints/saves.jsonl")
        self._forget_steps()
        self._forget_events()
        self._forget_saves()

    @property
    def behind(self) -> bool:
        """Whether the next read will find more that was already written."""
        return any(tail.share_read < 1 for tail in (self._steps, self._log, self._saves))

    def read(self) -> TrainingState:
        """Read what is new."""
        for row in self._steps.read(self._forget_steps):
            self._add_step(row)
        for event in self._log.read(self._forget_events):
            self._add_event(event)
        for row in self._saves.read(self._forget_saves):
            self._add_save(row)
        metrics, bad = f"{self.name}/metrics.jsonl", self._steps.bad_lines
        self.files.note(metrics, f"{bad} broken line{'s' if bad > 1 else ''}" if bad else "")
        return TrainingState(
            name=self.name,
            row=dict(self._row),
            newest=dict(self._newest),
            totals=dict(self._totals),
            phase=self._phase,
            last_update_s=self.files.changed_s(metrics),
            last_written_s=max(filter(None, map(self.files.changed_s, (metrics, f"{self.name}/{LOG}"))), default=None),
            share_read=self._steps.share_read,
            curves={
                name: MetricCurve(curve.means, curve.reach, self._last[name])
                for name, curve in self._curves.items()
                if curve.means
            },
            matched=tuple(self._matched),
            poisons_seen=self._poisons[0],
            poisons_met=self._poisons[1],
            step_s_p50=self._step_s["step_s_p50"],
            step_s_p99=self._step_s["step_s_p99"],
            evaluations=tuple(filter(None, map(_evaluation, self.files.rows(f"{self.name}/evaluations.jsonl")))),
            events=tuple(self._events),
            event_count=self._event_count,
            ranks=self._ranks,
            starts=self._starts,
            restarts=self._restarts,
            failure=self._ended and (self.files.text(f"{self.name}/{CAUSE}").strip()[:600] or self._ended),
            checkpoints=self._checkpoints,
            latest=self.files.text(f"{self.name}/checkpoints/LATEST").strip()[:100],
            trusted=self.files.text(f"{self.name}/checkpoints/TRUSTED").strip()[:100],
            left_out=self._left_out(),
        )

    def read_all(self) -> TrainingState:
        """Read everything that is written so far, however long that takes."""
        state = self.read()
        while self.behind:
            state = self.read()
        return state

    def _forget_steps(self) -> None:
        self._row: dict[str, float] = {}
        self._newest: dict[str, Any] = {}
        self._totals = {name: 0.0 for name, metric in METRICS.items() if metric.summed}
        self._phase = ""
        self._curves = {name: Thinned() for name in CURVES}
        self._last: dict[str, float] = {}
        self._matched: list[tuple[float, float]] = []
        self._poisons = [0, 0]
        self._step_s: dict[str, tuple[float, ...]] = {"step_s_p50": (), "step_s_p99": ()}

    def _add_step(self, row: Mapping[str, Any]) -> None:
        self._newest.update({name: value for name, value in row.items() if name in METRICS})
        numbers = {name: value for name, value in row.items() if is_number(value)}
        for name in self._totals:
            self._totals[name] += numbers.get(name, 0.0)
        progress, before = numbers.get("progress"), self._row.get("progress", 0.0)
        if progress is None:
            return
        self._phase = str(row.get("phase", ""))[:20]
        for name in CURVES:
            if name in numbers:
                self._curves[name].add(progress, numbers[name])
                self._last[name] = numbers[name]
        for name in self._step_s:
            by_rank = row.get(name)
            if isinstance(by_rank, list) and all(map(is_number, by_rank)):
                self._step_s[name] = tuple(by_rank[:_RANKS])
        if self._phase == "matched":
            self._shade(before, progress)
            self._poisons[0] += int(numbers.get("poisons_seen", 0))
            self._poisons[1] += int(numbers.get("poisons_met", 0))
        kept = {name: value for name, value in self._row.items() if name.startswith("pool_")}  # matched steps have them
        self._row = {**kept, **numbers}

    def _shade(self, start: float, end: float) -> None:
        if self._matched and self._matched[-1][1] == start:
            self._matched[-1] = (self._matched[-1][0], end)
            return
        self._matched.append((start, end))
        if len(self._matched) > _SPANS:  # merge what no screen can tell apart
            narrow, merged = end / _SPANS, self._matched[:1]
            for low, high in self._matched[1:]:
                if low - merged[-1][1] < 2 * narrow:
                    merged[-1] = (merged[-1][0], high)
                else:
                    merged.append((low, high))
            self._matched = merged

    def _forget_events(self) -> None:
        self._events: deque[RankEvent] = deque(maxlen=_EVENTS)
        self._event_count = self._starts = self._restarts = 0
        self._ranks: int | None = None
        self._ended = ""

    def _add_event(self, event: RankEvent) -> None:
        self._events.append(event)
        self._event_count += 1
        if started := _STARTED.search(event.text):
            self._ranks, self._ended = int(started[1]), ""
            self._starts += 1
        elif _ENDED.search(event.text):
            self._ended = event.text
            self._restarts += 1

    def _forget_saves(self) -> None:
        self._checkpoints = SavedCheckpoints()

    def _add_save(self, row: Mapping[str, Any]) -> None:
        known, asked = self._checkpoints, row.get("copied") is not None
        self._checkpoints = SavedCheckpoints(
            count=known.count + 1,
            last=row,
            last_copied=row if asked else known.last_copied,
            failed_copies=known.failed_copies + (asked and not row["copied"]),
        )

    def _left_out(self) -> tuple[str, ...]:
        found = self.files.read(f"{self.name}/diverged.json", _records) or ()
        return tuple(f"step {row.get('step')}: {row.get('why')}"[:300] for row in found)


_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
_STARTED = re.compile(r"^(\d+) ranks from step (\d+)")
_ENDED = re.compile(r"; (restart \d+ of \d+|no restart is left)$")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _event(line: bytes) -> RankEvent | None:
    found = _LINE.fullmatch(line.decode(errors="replace").rstrip("\n"))
    return RankEvent(found[1], found[2][:600]) if found else None


def _evaluation(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of an evaluation that can be shown; None without an epoch."""
    if not is_number(row.get("epoch")):
        return None
    shares = {key: row[key] for key, _, _ in SHARES if is_number(row.get(key)) and 0 <= row[key] <= 1}
    given = row.get("attacks")
    attacks = (
        {str(name)[:40]: rate for name, rate in given.items() if _is_rate(rate)} if isinstance(given, dict) else {}
    )
    return {
        "epoch": row["epoch"],
        "phase": row.get("phase"),
        **shares,
        "attacks": dict(list(attacks.items())[:_ATTACKS]),
    }


def _is_rate(value: Any) -> bool:
    try:
        numbers = [value["successes"], value["n"], value["rate"], *value["ci95"]]
    except (TypeError, KeyError):
        return False
    return len(numbers) == 5 and all(map(is_number, numbers))


def _records(content: bytes) -> list[dict[str, Any]]:
    return [row for row in json.loads(content) if isinstance(row, dict)]
