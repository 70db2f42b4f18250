"""The state of the oracle's check of one arm, and of its repair, read from the files that they leave. Images are kept by
their sha256, so that a page can ask for one without naming a path.
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
_TRIGGERS, _SUSPECTS, _LABELS, _REASONS, _TEXT = 8, 12, 40, 12, 600
_PNG = b"\x89PNG\r\n\x1a\n"
_IMAGE_BYTES = 2**20
TaskProgress = tuple[float, float, str]
"""Done, total, and a line of text."""


class PngStore:
    """PNGs by the sha256 of their bytes. Anything else, and a large PNG, is left out."""

    def __init__(self) -> None:
        self._bytes: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        return self._bytes[name]

    def keep(self, content: bytes) -> str:
        """Keep a PNG and return its name, which is empty if it was left out."""
        if not content.startswith(_PNG) or len(content) > _IMAGE_BYTES:
            return ""
        name = hashlib.sha256(content).hexdigest()
        self._bytes[name] = content
        return name

    def drop_all_but(self, names: set[str]) -> None:
        self._bytes = {name: content for name, content in self._bytes.items() if name in names}


@dataclass(frozen=True)
class ShownTrigger:
    """A trigger that the check found."""

    target: str
    kind: str
    size: str
    image: str
    """Name of its image, or empty."""
    flips: str
    """How many trusted images it flips, such as `59 of 64`."""
    control: str


@dataclass(frozen=True)
class Suspect:
    """An image on which model and oracle disagree."""

    image: str
    caption: str


@dataclass(frozen=True)
class Repair:
    """The outcome of a repair."""

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
    """Empty until there is one."""
    checkpoint: str = ""
    """The checkpoint that was judged."""
    reasons: tuple[str, ...] = ()
    target_labels: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    triggers: tuple[ShownTrigger, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    labels: tuple[Mapping[str, Any], ...] = ()
    """The table of labels: rows of report.json that were checked."""
    victims: int | None = None
    """How many images the check names as poisoned."""
    repair: Repair | None = None
    progress: TaskProgress | None = None
    """What the last check wrote about its progress, also after its end."""
    checking: TaskProgress | None = None
    """Progress of a check that is newer than the verdict."""
    rechecking: TaskProgress | None = None
    """Progress of the check of the repaired checkpoint."""

    @property
    def images(self) -> set[str]:
        return {shown.image for shown in (*self.triggers, *self.suspects)} - {""}


def oracle_state(files: WatchedFiles, arm: str, images: PngStore) -> OracleState:
    """Read `<arm>/oracle` and `<arm>/repair`."""
    name = f"{arm}/oracle/report.json"
    try:
        return _state(files, arm, files.table(name), images)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        files.note(name, f"not an oracle report ({type(error).__name__})")
        return OracleState(arm)


def _state(files: WatchedFiles, arm: str, report: Mapping[str, Any], images: PngStore) -> OracleState:
    verdict = report.get("verdict")
    labels = [row for row in report.get("labels") or () if isinstance(row, dict)]
    return OracleState(
        arm=arm,
        verdict=verdict if verdict in VERDICTS else "unknown" if report else "",
        checkpoint=_text((report.get("subject") or {}).get("checkpoint", "")),
        reasons=_texts(report.get("reasons"), _REASONS),
        target_labels=_texts(report.get("target_labels"), _LABELS),
        unchecked=_texts([row.get("label") for row in labels if row.get("status") == "unchecked"], _LABELS),
        labels=tuple(row for row in labels if row.get("status") != "unchecked"),
        victims=int(victims) if is_number(victims := (report.get("numbers") or {}).get("victims")) else None,
        triggers=tuple(_trigger(files, arm, row, images) for row in (report.get("triggers") or ())[:_TRIGGERS]),
        suspects=tuple(_suspect(row, images) for row in (report.get("pictures") or ())[:_SUSPECTS]),
        repair=_repair(files.table(f"{arm}/repair/repair.json")),
        progress=files.read(f"{arm}/oracle/progress.json", parse_progress),
        checking=_unfinished(files, f"{arm}/oracle/progress.json", f"{arm}/oracle/report.json"),
        rechecking=_unfinished(files, f"{arm}/repair/oracle/progress.json", f"{arm}/repair/repair.json"),
    )


def _trigger(files: WatchedFiles, arm: str, row: Mapping[str, Any], images: PngStore) -> ShownTrigger:
    found = re.fullmatch(r"triggers/(\d{1,6}\.png)", str(row.get("file", "")))
    content = files.read(f"{arm}/oracle/triggers/{found[1]}", bytes) if found else None
    side = row.get("size_px")
    return ShownTrigger(
        target=_text(row.get("target", "")),
        kind=_text(row.get("kind", "")),
        size=f"{side[0]:g} × {side[1]:g} px"
        if isinstance(side, list) and len(side) == 2 and all(map(is_number, side))
        else "",
        image=images.keep(content or b""),
        flips=_count(row.get("pasted")),
        control=_count(row.get("control")),
    )


def _suspect(row: Mapping[str, Any], images: PngStore) -> Suspect:
    return Suspect(images.keep(base64.b64decode(row["png"])), _text(row.get("caption", "")))


def _repair(result: Mapping[str, Any]) -> Repair | None:
    if not result:
        return None
    before, after = result.get("before") or {}, result.get("after") or {}
    figures = [row.get(key) for key in ("attack", "top1") for row in (before, after)]
    return Repair(
        result.get("accepted") is True,
        _texts(result.get("reasons"), _REASONS),
        *(figure if is_number(figure) else None for figure in figures),
    )


def _unfinished(files: WatchedFiles, progress: str, result: str) -> TaskProgress | None:
    """What a task writes about its progress, unless it has ended."""
    written, ended_s = files.read(progress, parse_progress), files.changed_s(result)
    if written is None or written[0] >= written[1] or (ended_s or 0.0) > (files.changed_s(progress) or 0.0):
        return None
    return written


def parse_progress(content: bytes) -> TaskProgress:
    """The content of a progress.json: a list of done, total, and a text."""
    done, total, text = json.loads(content)
    return float(done), float(total), _text(text)


def _count(trial: Any) -> str:
    return f"{trial['flips']:g} of {trial['n']:g}" if isinstance(trial, dict) else ""


def _texts(texts: Any, most: int) -> tuple[str, ...]:
    return tuple(map(_text, texts[:most])) if isinstance(texts, list) else ()


def _text(text: Any) -> str:
    return str(text)[:_TEXT]
