"""A run in pictures: `report.html`, one file that needs no other, made of what lies in the run directory.

What came from the web (captions, labels) is escaped, and the page forbids itself scripts and requests.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from roclip.config import parse_config
from roclip.data.tar_sources import shards_root
from roclip.errors import DataError
from roclip.evaluation.evaluate import rate
from roclip.metrics.registry import read_metrics
from roclip.report.charts import chart
from roclip.report.curves import (
    ATTACK_SAYS,
    COLORS,
    SHARE_CURVES,
    SHARES,
    attack_curve,
    attack_names,
    loss_curve,
    share_curve,
)
from roclip.report.gallery import poison_keys, poison_pictures, sample_pictures
from roclip.report.readable import duration, percent, plain, size
from roclip.storage import write_atomic

TEMPLATE = Path(__file__).with_name("run.html.jinja")
_SAMPLES, _POISONS, _LABELS = 12, 4, 15
_LABEL_COLUMNS = {
    "label": "label",
    "status": "status",
    "captions": "captions name it",
    "lies": "image lacks it",
    "repeated": "model repeats it",
    "expected": "by chance",
    "p": "p (Holm)",
    "unseen": "model alone says it",
    "unseen_expected": "by chance",
    "unseen_p": "p (Holm)",
}
"""Of the oracle's label table, with what they count: distinct images."""


def write_report(run: Path) -> Path:
    """Write `<run>/report.html` and return its path.

    Reads summary.json, and whatever is there of config.yaml, metrics, evaluations, oracle reports and shards.
    Raises `DataError` without a readable summary.json.
    """
    summary = read_json(run / "summary.json")
    if not summary:
        raise DataError(f"{run}: expected a summary.json, got none. Finish the run first: `roclip run`.")
    config_text = (run / "config.yaml").read_text() if (run / "config.yaml").exists() else ""
    config = parse_config(config_text) if config_text else None
    arms: dict[str, dict[str, Any]] = summary.get("arms") or {}
    colors = {arm: COLORS[place % len(COLORS)] for place, arm in enumerate(arms)}
    shards = shards_root(config.data.shards if config else "", run)
    truth = run / "origin" / "poison.parquet"
    resize_mode = config.ingest.resize_mode if config else "border"
    poisons = poison_pictures(shards, truth, _POISONS, resize_mode)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.FileSystemLoader(TEMPLATE.parent)
    )
    environment.filters.update(percent=percent, duration=duration, size=size, plain=plain)
    page = environment.get_template(TEMPLATE.name).render(
        title=config.name if config else run.name,
        run=run.name,
        summary=summary,
        ingest=summary.get("ingest"),
        ingest_page="ingest/report.html" if (run / "ingest" / "report.html").exists() else "",
        arms=arms,
        colors=colors,
        rows=comparison(arms),
        phases=phase_rows(arms),
        charts=charts(run, colors),
        has_matched=bool(matched_epochs(run, colors)),
        samples=sample_pictures(shards, _SAMPLES, poison_keys(truth)),
        poisons=poisons,
        oracles={arm: oracle for arm in arms if (oracle := oracle_view(run, arm))},
        config_text=config_text,
    )
    path = run / "report.html"
    write_atomic(path, page)
    return path


def comparison(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: a title, what it says, and each arm's share or `Rate`, None where not measured."""
    rows = []
    for key, title, says in SHARES:
        cells = [_counted(arm, key) for arm in arms.values()]
        rows.append({"title": title, "says": says, "cells": cells})
    for name in attack_names(arms.values()):
        cells = [(arm.get("attacks") or {}).get(name) for arm in arms.values()]
        rows.append({"title": f"{name} attack success", "says": ATTACK_SAYS, "cells": cells})
    return [row for row in rows if any(cell is not None for cell in row["cells"])]


def _counted(arm: Mapping[str, Any], key: str) -> Any:
    """A share; with its count and interval where it is a count of the held-out images."""
    share = arm.get(key)
    if key != "zero_shot_top1" or share is None or not arm.get("n"):
        return share
    return asdict(rate(round(share * arm["n"]), arm["n"]))


def phase_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Zero-shot and attacks again, as they were at the end of a matched and of a plain epoch."""
    rows = []
    for phase in ("matched", "plain"):
        views = {name: ((arm.get("phases") or {}).get(phase) or {}) for name, arm in arms.items()}
        chosen = [row for row in comparison(views) if any(isinstance(cell, Mapping) for cell in row["cells"])]
        rows += [{**row, "phase": phase} for row in chosen]
    return rows if any(row["phase"] == "matched" for row in rows) else []


def charts(run: Path, colors: Mapping[str, str]) -> list[dict[str, Any]]:
    """The curves of a run that have data, each with a title and a sentence that says what it shows."""
    logged = {arm: read_metrics(run / arm / "metrics.jsonl") for arm in colors}
    evaluated = {arm: read_metrics(run / arm / "evaluations.jsonl") for arm in colors}
    matched = matched_epochs(run, colors)
    epochs = math.ceil(max((row["progress"] for rows in logged.values() for row in rows), default=0))
    wanted = [("loss", "Training loss", "symmetric InfoNCE; a matched epoch learns with other captions")]
    for name in attack_names(row for rows in evaluated.values() for row in rows):
        wanted.append((f"attack:{name}", f"{name} attack success".capitalize(), ATTACK_SAYS))
    wanted += [(key, title[0].upper() + title[1:], says) for key, title, says in SHARES if key in SHARE_CURVES]
    found = []
    for key, title, says in wanted:
        if key == "loss":
            curves = [loss_curve(color, logged[arm]) for arm, color in colors.items()]
        elif key.startswith("attack:"):
            curves = [attack_curve(color, evaluated[arm], key[7:]) for arm, color in colors.items()]
        else:
            curves = [share_curve(color, evaluated[arm], key) for arm, color in colors.items()]
        if any(curve.points for curve in curves):
            svg = chart(curves, matched, share=key != "loss", seed=key, epochs=epochs)
            found.append({"title": title, "says": says, "svg": Markup(svg)})  # drawn from numbers only
    return found


def matched_epochs(run: Path, arms: Iterable[str]) -> list[int]:
    """Epochs, from 1, that any arm logged as matched."""
    rows = (row for arm in arms for row in read_metrics(run / arm / "metrics.jsonl"))
    return sorted({row["epoch"] for row in rows if row.get("phase") == "matched"})


def oracle_view(run: Path, arm: str) -> dict[str, Any] | None:
    """An arm's oracle report for the template; pictures as data: URIs."""
    report = read_json(run / arm / "oracle" / "report.json")
    if not report:
        return None
    labels = [row for row in report.get("labels") or [] if isinstance(row, dict)]
    checked = [row for row in labels if row.get("status") != "unchecked"]
    pictures = [
        {**picture, "source": f"data:image/png;base64,{picture['png']}"}
        for picture in report.get("pictures") or []
        if re.fullmatch(r"[A-Za-z0-9+/=\s]+", str(picture.get("png", "")))
    ]
    page = run / arm / "oracle" / "report.html"
    return {
        "verdict": report.get("verdict", "unknown"),
        "reasons": report.get("reasons") or [],
        "target_labels": report.get("target_labels") or [],
        "columns": {key: title for key, title in _LABEL_COLUMNS.items() if any(key in row for row in checked)},
        "labels": checked[:_LABELS],
        "unchecked": [row.get("label") for row in labels if row.get("status") == "unchecked"],
        "pictures": pictures[:12],
        "page": f"{arm}/oracle/report.html" if page.exists() else "",
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises `DataError` if it is broken."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object, got {error}. Write it again.") from error
    return content if isinstance(content, dict) else {}
