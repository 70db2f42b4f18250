"""Where one training stands, by the files that it leaves in its folder: steps, evaluations, ranks, checkpoints."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from roclip.report.curves import SHARES
from roclip.report.thinning import Thinned
from roclip.report.watched_files import Tail, WatchedFiles

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
"""Metrics whose course is kept."""
LOG = "log/ranks.log"
"""In a training's folder: what befell its ranks, a line each."""
CAUSE = "failure.txt"
"""Beside it: why they ended the last time."""
_SPANS, _EVENTS, _ATTACKS, _RANKS = 400, 12, 12, 4096
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Course:
    """A metric over the epochs done, thinned."""

    means: Points
    reach: Points = ()
    """Least and greatest value that each of `means` stands for; empty where each stands for itself."""
    last: float = 0.0


@dataclass(frozen=True)
class Event:
    """A line of the ranks' log."""

    when: str
    text: str


@dataclass(frozen=True)
class TrainingState:
    """One training."""

    name: str
    row: Mapping[str, float] = field(default_factory=dict)
    """The numbers of the last logged step, by their names in `roclip.metrics.registry`."""
    phase: str = ""
    changed_s: float | None = None
    """When that step was logged, in seconds since 1970."""
    share_read: float = 1.0
    """How much of the metrics has been read so far."""
    courses: Mapping[str, Course] = field(default_factory=dict)
    matched: Points = ()
    """Stretches of epochs that were matched."""
    poisons_seen: int = 0
    """Poisoned images of the logged matched steps, by the ground truth."""
    poisons_met: int = 0
    step_s_p50: tuple[float, ...] = ()
    """By rank."""
    step_s_p99: tuple[float, ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """Rows of evaluations.jsonl: numbers checked, the rest left out."""
    events: tuple[Event, ...] = ()
    """The last of them."""
    ranks: int | None = None
    restarts: int = 0
    failure: str = ""
    """Why it ended, where no restart is left; or why it waits for one."""
    latest: str = ""
    trusted: str = ""
    left_out: tuple[str, ...] = ()
    """Steps that diverged, each in words."""

    @property
    def progress(self) -> float:
        """Epochs done."""
        return self.row.get("progress", 0.0)


class TrainingReader:
    """Reads the folder of a training again and again.

    Args:
        files: Of the run.
        name: The folder's name in it, such as `roclip`.
    """

    def __init__(self, files: WatchedFiles, name: str):
        self.files, self.name = files, name
        self._tail = Tail(files.root / name / "metrics.jsonl")
        self._begin()

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        return self._tail.share_read < 1

    def look(self) -> TrainingState:
        """Read what is new."""
        for row in self._tail.look(self._begin):
            self._take(row)
        metrics = f"{self.name}/metrics.jsonl"
        bad = self._tail.bad_lines
        self.files.note(metrics, f"{bad} line{'s' if bad > 1 else ''} of it" if bad else "")
        events = self._events()
        return TrainingState(
            name=self.name,
            row=dict(self._row),
            phase=self._phase,
            changed_s=self.files.changed_s(metrics),
            share_read=self._tail.share_read,
            courses={
                name: Course(curve.means, curve.reach, self._last[name])
                for name, curve in self._curves.items()
                if curve.means
            },
            matched=tuple(self._spans),
            poisons_seen=self._poisons[0],
            poisons_met=self._poisons[1],
            step_s_p50=self._step_s["step_s_p50"],
            step_s_p99=self._step_s["step_s_p99"],
            evaluations=tuple(filter(None, map(_evaluation, self.files.rows(f"{self.name}/evaluations.jsonl")))),
            events=events[-_EVENTS:],
            ranks=_ranks(events),
            restarts=sum(bool(_ENDED.search(event.text)) for event in events),
            failure=self._failure(events),
            latest=self.files.words(f"{self.name}/checkpoints/LATEST").strip()[:100],
            trusted=self.files.words(f"{self.name}/checkpoints/TRUSTED").strip()[:100],
            left_out=self._left_out(),
        )

    def _begin(self) -> None:
        self._row: dict[str, float] = {}
        self._phase = ""
        self._curves = {name: Thinned() for name in CURVES}
        self._last: dict[str, float] = {}
        self._spans: list[tuple[float, float]] = []
        self._poisons = [0, 0]
        self._step_s: dict[str, tuple[float, ...]] = {"step_s_p50": (), "step_s_p99": ()}

    def _take(self, row: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if is_number(value)}
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
        if self._spans and self._spans[-1][1] == start:
            self._spans[-1] = (self._spans[-1][0], end)
            return
        self._spans.append((start, end))
        if len(self._spans) > _SPANS:  # what no screen can tell apart becomes one
            narrow, merged = end / _SPANS, self._spans[:1]
            for low, high in self._spans[1:]:
                if low - merged[-1][1] < 2 * narrow:
                    merged[-1] = (merged[-1][0], high)
                else:
                    merged.append((low, high))
            self._spans = merged

    def _events(self) -> tuple[Event, ...]:
        lines = self.files.words(f"{self.name}/{LOG}").splitlines()[-1000:]
        found = (re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", line) for line in lines)
        return tuple(Event(line[1], line[2][:600]) for line in found if line)

    def _failure(self, events: tuple[Event, ...]) -> str:
        """What the log ended with, if no rank has started since."""
        ended = ""
        for event in events:
            if _STARTED.search(event.text):
                ended = ""
            elif _ENDED.search(event.text):
                ended = event.text
        return ended and (self.files.words(f"{self.name}/{CAUSE}").strip()[:600] or ended)

    def _left_out(self) -> tuple[str, ...]:
        found = self.files.read(f"{self.name}/diverged.json", _records) or ()
        return tuple(f"step {row.get('step')}: {row.get('why')}"[:300] for row in found)


_STARTED = re.compile(r"^(\d+) ranks from step (\d+)")
_ENDED = re.compile(r"; (restart \d+ of \d+|no restart is left)$")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _ranks(events: tuple[Event, ...]) -> int | None:
    started = [found for event in events if (found := _STARTED.search(event.text))]
    return int(started[-1][1]) if started else None


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
