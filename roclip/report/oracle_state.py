"""What the oracle says of one arm, and what came of the repair, by the files that they leave. Pictures are kept by their
sha256, so that a page can ask for one without naming a path.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from roclip.report.training_state import is_number
from roclip.report.watched_files import WatchedFiles

VERDICTS = ("clean", "suspicious", "poisoned", "inconclusive")
_TRIGGERS, _SUSPECTS, _LABELS, _REASONS, _WORDS = 8, 12, 40, 12, 600
_PNG = b"\x89PNG\r\n\x1a\n"
_PICTURE_BYTES = 2**20
Standing = tuple[float, float, str]
"""Done, total, and a line of words."""


class PngStore:
    """PNGs by the sha256 of their bytes. What is no PNG, or a large one, is left out."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        return self._bytes[name]

    def keep(self, content: bytes) -> str:
        """Its name; empty for what is left out."""
        if not content.startswith(_PNG) or len(content) > _PICTURE_BYTES:
            return ""
        name = hashlib.sha256(content).hexdigest()
        self._bytes[name] = content
        return name

    def drop_all_but(self, names: set[str]) -> None:
        self._bytes = {name: content for name, content in self._bytes.items() if name in names}


@dataclass(frozen=True)
class ShownTrigger:
    """One that was found."""

    target: str
    kind: str
    size: str
    picture: str
    """Name of its picture, or empty."""
    flips: str
    """Of trusted pictures, such as `59 of 64`."""
    control: str


@dataclass(frozen=True)
class Suspect:
    """A picture on which model and oracle disagree."""

    picture: str
    caption: str


@dataclass(frozen=True)
class Repair:
    """What came of it."""

    accepted: bool
    reasons: tuple[str, ...]
    attack_before: float | None
    attack_after: float | None
    top1_before: float | None
    top1_after: float | None


@dataclass(frozen=True)
class OracleState:
    """The check of one arm."""

    arm: str
    verdict: str = ""
    """Empty as long as there is none."""
    checkpoint: str = ""
    """That was judged."""
    reasons: tuple[str, ...] = ()
    target_labels: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    triggers: tuple[ShownTrigger, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    repair: Repair | None = None
    checking: Standing | None = None
    """How far the check is that is newer than the verdict."""
    rechecking: Standing | None = None
    """How far the check of the repaired checkpoint is."""

    @property
    def pictures(self) -> set[str]:
        return {shown.picture for shown in (*self.triggers, *self.suspects)} - {""}


def oracle_state(files: WatchedFiles, arm: str, pictures: PngStore) -> OracleState:
    """Read what there is in `<arm>/oracle` and `<arm>/repair`."""
    name = f"{arm}/oracle/report.json"
    try:
        return _state(files, arm, files.table(name), pictures)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        files.note(name, f"not a report of the oracle ({type(error).__name__})")
        return OracleState(arm)


def _state(files: WatchedFiles, arm: str, report: Mapping[str, Any], pictures: PngStore) -> OracleState:
    verdict = report.get("verdict")
    labels = [row for row in report.get("labels") or () if isinstance(row, dict)]
    return OracleState(
        arm=arm,
        verdict=verdict if verdict in VERDICTS else "unknown" if report else "",
        checkpoint=_word((report.get("subject") or {}).get("checkpoint", "")),
        reasons=_words(report.get("reasons"), _REASONS),
        target_labels=_words(report.get("target_labels"), _LABELS),
        unchecked=_words([row.get("label") for row in labels if row.get("status") == "unchecked"], _LABELS),
        triggers=tuple(_trigger(files, arm, row, pictures) for row in (report.get("triggers") or ())[:_TRIGGERS]),
        suspects=tuple(_suspect(row, pictures) for row in (report.get("pictures") or ())[:_SUSPECTS]),
        repair=_repair(files.table(f"{arm}/repair/repair.json")),
        checking=_standing(files, f"{arm}/oracle/progress.json", f"{arm}/oracle/report.json"),
        rechecking=_standing(files, f"{arm}/repair/oracle/progress.json", f"{arm}/repair/repair.json"),
    )


def _trigger(files: WatchedFiles, arm: str, row: Mapping[str, Any], pictures: PngStore) -> ShownTrigger:
    found = re.fullmatch(r"triggers/(\d{1,6}\.png)", str(row.get("file", "")))
    content = files.read(f"{arm}/oracle/triggers/{found[1]}", bytes) if found else None
    side = row.get("size_px")
    return ShownTrigger(
        target=_word(row.get("target", "")),
        kind=_word(row.get("kind", "")),
        size=f"{side[0]:g} × {side[1]:g} px"
        if isinstance(side, list) and len(side) == 2 and all(map(is_number, side))
        else "",
        picture=pictures.keep(content or b""),
        flips=_count(row.get("pasted")),
        control=_count(row.get("control")),
    )


def _suspect(row: Mapping[str, Any], pictures: PngStore) -> Suspect:
    return Suspect(pictures.keep(base64.b64decode(row["png"])), _word(row.get("caption", "")))


def _repair(result: Mapping[str, Any]) -> Repair | None:
    if not result:
        return None
    before, after = result.get("before") or {}, result.get("after") or {}
    figures = [row.get(key) for key in ("attack", "top1") for row in (before, after)]
    return Repair(
        result.get("accepted") is True,
        _words(result.get("reasons"), _REASONS),
        *(figure if is_number(figure) else None for figure in figures),
    )


def _standing(files: WatchedFiles, progress: str, result: str) -> Standing | None:
    """How far a task says it is, unless it has ended."""
    told, ended_s = files.read(progress, _told), files.changed_s(result)
    if told is None or told[0] >= told[1] or (ended_s or 0.0) > (files.changed_s(progress) or 0.0):
        return None
    return told


def _told(content: bytes) -> Standing:
    done, total, text = json.loads(content)
    return float(done), float(total), _word(text)


def _count(trial: Any) -> str:
    return f"{trial['flips']:g} of {trial['n']:g}" if isinstance(trial, dict) else ""


def _words(texts: Any, most: int) -> tuple[str, ...]:
    return tuple(map(_word, texts[:most])) if isinstance(texts, list) else ()


def _word(text: Any) -> str:
    return str(text)[:_WORDS]
