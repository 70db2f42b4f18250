"""Writes the files of a check: report.json, victims.parquet, disagreements.parquet, and report.html, a self-contained page.

The figures of the page are stored in page.json, so that the page can be rendered again when a repair is added. Captions come
from the web: they are escaped, and the page's content policy forbids scripts and requests.
"""

import base64
import colorsys
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from roclip.found_triggers import KINDS, FoundTrigger
from roclip.oracle import statistics
from roclip.oracle.figures import trigger_figure
from roclip.oracle.held_out import TrustedImages
from roclip.oracle.scan.images import ScannedImages
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.segmenters.base import Segmenter
from roclip.oracle.victims import Victims
from roclip.report.pages import environment
from roclip.storage import write_atomic

SCHEMA = 5
"""Version of report.json."""
MAX_FIGURES = 24
"""Maximum number of suspect images in report.html; the first half of them are in report.json, too."""
_PANEL_PX = 144


def write_outputs(
    report: dict[str, Any],
    scan: ScanResult,
    victims: Victims,
    triggers: Sequence[FoundTrigger],
    held_out: TrustedImages,
    scanned_images: ScannedImages,
    scorer: Scorer,
    out: Path,
) -> None:
    """Write all files to `out`, report.json last: its presence means that the check is complete."""
    labels, segmenter = scorer.labels, scorer.segmenter
    rows = disagreements(scan, victims.named, labels)
    _write_table(out / "disagreements.parquet", rows, DISAGREEMENTS)
    _write_table(out / "victims.parquet", victim_rows(scan, victims, labels), VICTIMS)
    repeated = [row for row in rows if row["victim"]] or [row for row in rows if row["d3"]]
    resisted = [row for row in rows if row["d2"] and not row["d3"]]
    suspects = _gallery(_alternating(repeated, MAX_FIGURES), scan, segmenter, labels, scanned_images)
    others = _gallery(_alternating(resisted, MAX_FIGURES // 3), scan, segmenter, labels, scanned_images)
    trigger_figures = [trigger_figure(trigger, held_out, scanned_images, scorer) for trigger in triggers]
    content = {"suspects": suspects, "others": others, "exhibits": trigger_figures, "labels": list(labels)}
    page = render(report, content)
    report["pictures"] = [
        {
            "png": figure["png"],
            "caption": f"{figure['caption']} – model: {figure['model']}, oracle: {figure['oracle']}",
        }
        for figure in suspects[: MAX_FIGURES // 2]
    ]
    write_atomic(out / "page.json", json.dumps(content))
    write_atomic(out / "report.html", page)
    write_atomic(out / "report.json", json.dumps(report, indent=1))


def add_repair(repair: dict[str, Any], out: Path) -> None:
    """Render the page of the complete check in `out` again, with the content of repair.json."""
    report, content = (json.loads((out / name).read_text()) for name in ("report.json", "page.json"))
    write_atomic(out / "report.html", render(report, content, repair))


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_atomic(path, buffer.getvalue())


DISAGREEMENTS = pa.schema(
    [
        ("rank", pa.int32()),
        ("sha256", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("model", pa.string()),  # zero-shot answer
        ("oracle", pa.list_(pa.string())),  # labels that it clearly finds, the largest first
        ("lie", pa.string()),  # label that only captions name
        ("d1", pa.bool_()),  # model against oracle
        ("d2", pa.bool_()),  # caption against oracle
        ("d3", pa.bool_()),  # the model repeats what only the caption says
        ("victim", pa.bool_()),  # named as a victim (`victims.py`)
        ("image", pa.int32()),  # number of the distinct image in this scan
    ]
)
VICTIMS = pa.schema(
    [
        ("rank", pa.int32()),
        ("score", pa.float64()),  # over 1 where the trigger is in the image
        ("target", pa.string()),
        ("trigger", pa.int32()),  # number of triggers/<number>.png; null if the image carries none
        ("oracle", pa.list_(pa.string())),
        ("keys", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("image", pa.int32()),
    ]
)


def victim_rows(scan: ScanResult, victims: Victims, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per victim, the most certain first; columns as in `VICTIMS`."""
    caption_rows = scan.caption_rows()
    order = [int(n) for n in np.argsort(-victims.score, kind="stable") if victims.score[n] > 0]
    return [
        {
            "rank": rank,
            "score": float(victims.score[n]),
            "target": labels[int(victims.target[n])],
            "trigger": int(victims.trigger[n]) if victims.trigger[n] >= 0 else None,
            "oracle": _clearly(scan, n, labels),
            "keys": [scan.keys[row] for row in caption_rows[n]],
            "captions": [scan.captions[row] for row in caption_rows[n]],
            "sha256": scan.sha256[n],
            "image": n,
        }
        for rank, n in enumerate(order, 1)
    ]


def _clearly(scan: ScanResult, n: int, labels: Sequence[str]) -> list[str]:
    """Return the labels that the oracle clearly finds in an image, the largest first."""
    largest = np.argsort(-scan.areas[n], kind="stable").tolist()
    return [labels[int(c)] for c in largest if scan.observations.clear[n, c]]


def disagreements(scan: ScanResult, victims: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per image on which model, captions or oracle disagree, the most suspicious first (`DISAGREEMENTS`)."""
    seen = scan.observations
    lies, says = seen.lies(), seen.answer_mask()
    d1, d2, d3 = (np.asarray(rows.any(axis=1)) for rows in (says & ~seen.seen, lies, lies & says))
    # Area of the largest clear label minus that of the label that the caption claims.
    contrast = (scan.areas * seen.clear).max(axis=1, initial=0) - (scan.areas * lies).max(axis=1, initial=0)
    copies = np.minimum(seen.captions, 99)
    order = [n for n in np.lexsort((-contrast, -copies, ~d3, ~victims)) if d1[n] or d2[n]]
    caption_rows, rows = scan.caption_rows(), []
    for rank, n in enumerate(order, 1):
        lied = lies[n] & says[n] if d3[n] else lies[n]
        rows.append(
            {
                "rank": rank,
                "sha256": scan.sha256[n],
                "keys": [scan.keys[row] for row in caption_rows[n]],
                "captions": [scan.captions[row] for row in caption_rows[n]],
                "model": labels[int(seen.answer[n])],
                "oracle": _clearly(scan, n, labels),
                "lie": labels[int(np.flatnonzero(lied)[0])] if lied.any() else None,
                "d1": bool(d1[n]),
                "d2": bool(d2[n]),
                "d3": bool(d3[n]),
                "victim": bool(victims[n]),
                "image": int(n),
            }
        )
    return rows


def render(report: dict[str, Any], content: dict[str, Any], repair: dict[str, Any] | None = None) -> str:
    """Render the page.

    Args:
        report: The content of report.json.
        content: The content of page.json: images `suspects` and `others` as `_gallery` returns them, `exhibits` with one
            `trigger_figure` per trigger, and all `labels`.
        repair: The content of repair.json, if there is one.
    """
    checked = [row for row in report["labels"] if "lies" in row]
    labels = content["labels"]
    return (
        environment(Path(__file__).parent)
        .get_template("report.html.jinja")
        .render(
            report=report,
            repair=repair,
            checked=checked,
            longest=max([row["lies"] for row in checked] + [row["expected"] for row in checked], default=0) or 1,
            suspects=content["suspects"],
            others=content["others"],
            exhibits=list(zip(report["triggers"], content["exhibits"], strict=True)),
            colors={label: f"rgb{color}" for label, color in zip(labels, palette(len(labels)), strict=True)},
            min_belief=statistics.MIN_BELIEF,
            kinds={name: kind.title for name, kind in KINDS.items()},
        )
    )


def palette(number: int) -> list[tuple[int, int, int]]:
    """Return `number` distinct saturated RGB colours."""
    hues = [(0.09 + place * 0.618034) % 1 for place in range(number)]
    triples = [colorsys.hls_to_rgb(hue, 0.5, 0.85) for hue in hues]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in triples]


def _alternating(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the first rows, alternating between images with one caption and with several, and between labels."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((len(row["keys"]) > 1, row["lie"] if len(row["keys"]) == 1 else ""), []).append(row)
    turns = [
        (place, number_of_group, row)
        for number_of_group, group in enumerate(groups.values())
        for place, row in enumerate(group)
    ]
    return [row for _, _, row in sorted(turns, key=lambda turn: turn[:2])[:number]]


def _gallery(
    rows: list[dict[str, Any]],
    scan: ScanResult,
    segmenter: Segmenter,
    labels: Sequence[str],
    scanned_images: ScannedImages,
) -> list[dict[str, Any]]:
    """Return each row's image beside its mask, as base64 PNG, with its caption, labels and key."""
    if not rows:
        return []
    images = scanned_images.read(np.array([row["image"] for row in rows]))
    masks = segmenter.masks(images)
    return [
        {
            "png": two_panels(image, mask, len(labels)),
            "caption": row["captions"][0],
            "more": len(row["captions"]) - 1,
            "model": row["model"],
            "oracle": ", ".join(row["oracle"]) or "no known label",
            "oracle_labels": row["oracle"],
            "lie": row["lie"] or "",
            "repeated": row["d3"],
            "key": row["keys"][0],
        }
        for row, image, mask in zip(rows, images, masks, strict=True)
    ]


def two_panels(image: np.ndarray, mask: np.ndarray, classes: int) -> str:
    """Return a base64 PNG of the image, and of the image in grey with every object of the mask in its label's colour."""
    gray = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.55 + 100
    colors = np.array([(0, 0, 0), *palette(classes)], dtype=float)[mask]
    on = (mask > 0)[:, :, None]
    overlay = np.where(on, 0.35 * gray + 0.65 * colors, gray).clip(0, 255).astype(np.uint8)
    panels = [Image.fromarray(panel) for panel in (image, overlay)]
    if max(image.shape) < _PANEL_PX:
        panels = [panel.resize((_PANEL_PX, _PANEL_PX), Image.Resampling.BICUBIC) for panel in panels]
    else:
        for panel in panels:
            panel.thumbnail((_PANEL_PX, _PANEL_PX))
    width, height = panels[0].size
    sheet = Image.new("RGB", (2 * width + 4, height), (255, 255, 255))
    sheet.paste(panels[0], (0, 0))
    sheet.paste(panels[1], (width + 4, 0))
    buffer = io.BytesIO()
    sheet.quantize(128).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
