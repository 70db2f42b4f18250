"""The report of a run: `report.html`, one file that needs no other, made from what the reader of the run finds.

Text from the web (captions, labels) is escaped, and the page forbids itself scripts and requests.
"""

import base64
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roclip.data.tar_sources import shards_root
from roclip.errors import DataError
from roclip.evaluation.rate import rate
from roclip.report.curves import ATTACK_SAYS, COLORS, SHARES, attack_names
from roclip.report.gallery import poison_images, poison_keys, sample_images
from roclip.report.ingest_progress import failure_reasons
from roclip.report.oracle_state import OracleState, PngStore
from roclip.report.pages import environment
from roclip.report.run_charts import RunCharts
from roclip.report.run_state import RunReader, RunState
from roclip.storage import write_atomic

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
"""Columns of the oracle's label table, and what they count: distinct images."""


def write_report(run: Path) -> Path:
    """Write `<run>/report.html` and return its path.

    Reads summary.json and, if they exist, config.yaml, metrics, evaluations, oracle reports and shards.
    Raises `DataError` without a readable summary.json.
    """
    images = PngStore()
    state = RunReader(run, images).read_all()
    summary = state.summary
    if why := state.unreadable.get("summary.json"):
        raise DataError(f"{run / 'summary.json'}: expected a JSON object, got {why}. Write it again: `roclip run`.")
    if not summary:
        raise DataError(f"{run}: expected a summary.json, got none. Finish the run first: `roclip run`.")
    arms: dict[str, dict[str, Any]] = summary.get("arms") or {}
    oracles = {oracle.arm: oracle for oracle in state.oracles if oracle.arm in arms and oracle.verdict}
    config = state.config
    shards = shards_root(config.data.shards if config else "", run)
    truth = run / "origin" / "poison.parquet"
    ingest = summary.get("ingest")
    page = (
        environment()
        .get_template("run.html.jinja")
        .render(
            title=state.name,
            run=run.name,
            summary=summary,
            ingest=ingest,
            reasons=failure_reasons((ingest or {}).get("failed") or {}),
            ingest_page="ingest/report.html" if (run / "ingest" / "report.html").exists() else "",
            arms=arms,
            places={arm: place % len(COLORS) for place, arm in enumerate(arms)},
            rows=comparison(arms),
            phases=phase_rows(arms),
            charts=charts(state, list(arms)),
            has_matched=any(training.matched for training in state.trainings),
            samples=sample_images(shards, _SAMPLES, poison_keys(truth)),
            poisons=poison_images(shards, truth, _POISONS, config.ingest.resize_mode if config else "border"),
            oracles={arm: oracle_view(run, oracles[arm], images) for arm in arms if arm in oracles},
            config_text=state.config_text,
        )
    )
    path = run / "report.html"
    write_atomic(path, page)
    return path


def comparison(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the table: a title, an explanation, and each arm's share or `Rate`, None if it was not measured."""
    rows = []
    for key, title, says in SHARES:
        cells = [_counted(arm, key) for arm in arms.values()]
        rows.append({"title": title, "says": says, "cells": cells})
    for name in attack_names(arms.values()):
        cells = [(arm.get("attacks") or {}).get(name) for arm in arms.values()]
        rows.append({"title": f"{name} attack success", "says": ATTACK_SAYS, "cells": cells})
    return [row for row in rows if any(cell is not None for cell in row["cells"])]


def _counted(arm: Mapping[str, Any], key: str) -> Any:
    """A share; as a count with its interval if it counts held-out images."""
    share = arm.get(key)
    if key != "zero_shot_top1" or share is None or not arm.get("n"):
        return share
    return asdict(rate(round(share * arm["n"]), arm["n"]))


def phase_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Zero-shot accuracy and attacks at the end of the last matched and of the last plain epoch."""
    rows = []
    for phase in ("matched", "plain"):
        views = {name: ((arm.get("phases") or {}).get(phase) or {}) for name, arm in arms.items()}
        chosen = [row for row in comparison(views) if any(isinstance(cell, Mapping) for cell in row["cells"])]
        rows += [{**row, "phase": phase} for row in chosen]
    return rows if any(row["phase"] == "matched" for row in rows) else []


def charts(state: RunState, arms: list[str]) -> list[dict[str, Any]]:
    """The charts of a run that have data, in the colours of the summary's arms."""
    trainings = [training for training in state.trainings if training.name in arms]
    colors = {arm: f"var(--arm{place % len(COLORS)})" for place, arm in enumerate(arms)}
    until = max((training.row.get("epochs", 0.0) for training in trainings), default=0.0)
    drawn = RunCharts(trainings, colors, [span for training in trainings for span in training.matched], until)
    return drawn.loss() + drawn.evaluations()


def oracle_view(run: Path, oracle: OracleState, images: PngStore) -> dict[str, Any]:
    """An arm's oracle report for the template, with images as data: URIs."""
    page = run / oracle.arm / "oracle" / "report.html"
    return {
        "verdict": oracle.verdict,
        "reasons": oracle.reasons,
        "target_labels": oracle.target_labels,
        "columns": {key: title for key, title in _LABEL_COLUMNS.items() if any(key in row for row in oracle.labels)},
        "labels": oracle.labels[:_LABELS],
        "unchecked": oracle.unchecked,
        "images": [
            {
                "source": f"data:image/png;base64,{base64.b64encode(images[suspect.image]).decode()}",
                "caption": suspect.caption,
            }
            for suspect in oracle.suspects
            if suspect.image
        ],
        "page": f"{oracle.arm}/oracle/report.html" if page.exists() else "",
    }
