"""What a check leaves on disk: report.json, victims.parquet, disagreements.parquet, and report.html, one page that needs no
other file. What is on that page beside the report stays in page.json, so that it can tell of a repair later.

Captions come from the web: they are escaped, and the page forbids itself scripts and requests.
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

from roclip.found_triggers import FoundTrigger
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
PICTURES = 24
"""Suspect images in report.html; the first half of them are in report.json too."""
_PANEL_PX = 144


def write_outputs(
    report: dict[str, Any],
    scan: ScanResult,
    victims: Victims,
    triggers: Sequence[FoundTrigger],
    held_out: TrustedImages,
    pictures: ScannedImages,
    scorer: Scorer,
    out: Path,
) -> None:
    """Write all files to `out`, report.json last: where it is, the check is complete."""
    labels, segmenter = scorer.labels, scorer.segmenter
    rows = disagreements(scan, victims.named, labels)
    _write_table(out / "disagreements.parquet", rows, DISAGREEMENTS)
    _write_table(out / "victims.parquet", victim_rows(scan, victims, labels), VICTIMS)
    repeated = [row for row in rows if row["victim"]] or [row for row in rows if row["d3"]]
    resisted = [row for row in rows if row["d2"] and not row["d3"]]
    suspects = _pictures(_varied(repeated, PICTURES), scan, segmenter, labels, pictures)
    others = _pictures(_varied(resisted, PICTURES // 3), scan, segmenter, labels, pictures)
    shown = [trigger_figure(trigger, held_out, pictures, scorer) for trigger in triggers]
    shows = {"suspects": suspects, "others": others, "exhibits": shown, "labels": list(labels)}
    page = render(report, shows)
    report["pictures"] = [
        {
            "png": picture["png"],
            "caption": f"{picture['caption']} – model: {picture['model']}, oracle: {picture['oracle']}",
        }
        for picture in suspects[: PICTURES // 2]
    ]
    write_atomic(out / "page.json", json.dumps(shows))
    write_atomic(out / "report.html", page)
    write_atomic(out / "report.json", json.dumps(report, indent=1))


def add_repair(repair: dict[str, Any], out: Path) -> None:
    """Write the page of the complete check in `out` again, with what came of the repair: the content of repair.json."""
    report, shows = (json.loads((out / name).read_text()) for name in ("report.json", "page.json"))
    write_atomic(out / "report.html", render(report, shows, repair))


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
        ("oracle", pa.list_(pa.string())),  # labels it clearly sees, the largest first
        ("lie", pa.string()),  # label that only captions name
        ("d1", pa.bool_()),  # model against oracle
        ("d2", pa.bool_()),  # caption against oracle
        ("d3", pa.bool_()),  # the model repeats what only the caption says
        ("victim", pa.bool_()),  # d3, of a label or a kind for which chance does not explain it
        ("image", pa.int32()),  # number of the distinct image in this pass
    ]
)
VICTIMS = pa.schema(
    [
        ("rank", pa.int32()),
        ("score", pa.float64()),  # over 1 where the trigger is in the image
        ("target", pa.string()),
        ("trigger", pa.int32()),  # number of triggers/<number>.png; null where none is in the image
        ("oracle", pa.list_(pa.string())),
        ("keys", pa.list_(pa.string())),
        ("captions", pa.list_(pa.string())),
        ("sha256", pa.string()),
        ("image", pa.int32()),
    ]
)


def victim_rows(scan: ScanResult, victims: Victims, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row a victim, the surest first; columns as in `VICTIMS`."""
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
    """Labels that the oracle clearly sees in an image, the largest first."""
    largest = np.argsort(-scan.areas[n], kind="stable").tolist()
    return [labels[int(c)] for c in largest if scan.observations.clear[n, c]]


def disagreements(scan: ScanResult, victims: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row a distinct image on which the three disagree, the most suspicious first; columns as in `DISAGREEMENTS`."""
    seen = scan.observations
    lies, says = seen.lies(), seen.says()
    d1, d2, d3 = (np.asarray(rows.any(axis=1)) for rows in (says & ~seen.seen, lies, lies & says))
    # How much more of the image is something else than what the caption claims.
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


def render(report: dict[str, Any], shows: dict[str, Any], repair: dict[str, Any] | None = None) -> str:
    """The page. `shows`: images `suspects` and `others` as `_pictures` makes them, `exhibits` as `trigger_figure` does, one a
    trigger, and all `labels`. `repair`: the content of repair.json."""
    checked = [row for row in report["labels"] if "lies" in row]
    labels = shows["labels"]
    return (
        environment(Path(__file__).parent)
        .get_template("report.html.jinja")
        .render(
            report=report,
            repair=repair,
            checked=checked,
            longest=max([row["lies"] for row in checked] + [row["expected"] for row in checked], default=0) or 1,
            suspects=shows["suspects"],
            others=shows["others"],
            exhibits=list(zip(report["triggers"], shows["exhibits"], strict=True)),
            colors={label: f"rgb{color}" for label, color in zip(labels, palette(len(labels)), strict=True)},
            min_belief=statistics.MIN_BELIEF,
        )
    )


def palette(number: int) -> list[tuple[int, int, int]]:
    """So many different strong colours."""
    hues = [(0.09 + place * 0.618034) % 1 for place in range(number)]
    triples = [colorsys.hls_to_rgb(hue, 0.5, 0.85) for hue in hues]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in triples]


def _varied(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The first rows, images with one caption and with several in turn, and labels in turn."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((len(row["keys"]) > 1, row["lie"] if len(row["keys"]) == 1 else ""), []).append(row)
    turns = [
        (place, number_of_group, row)
        for number_of_group, group in enumerate(groups.values())
        for place, row in enumerate(group)
    ]
    return [row for _, _, row in sorted(turns, key=lambda turn: turn[:2])[:number]]


def _pictures(
    rows: list[dict[str, Any]], scan: ScanResult, segmenter: Segmenter, labels: Sequence[str], pictures: ScannedImages
) -> list[dict[str, Any]]:
    """Each row's image beside what the oracle sees in it, as base64 PNG, with the words that belong to it."""
    if not rows:
        return []
    images = pictures.read(np.array([row["image"] for row in rows]))
    masks = segmenter.masks(images)
    return [
        {
            "png": two_panels(image, mask, len(labels)),
            "caption": row["captions"][0],
            "more": len(row["captions"]) - 1,
            "model": row["model"],
            "oracle": ", ".join(row["oracle"]) or "nothing it knows",
            "oracle_labels": row["oracle"],
            "lie": row["lie"] or "",
            "repeated": row["d3"],
            "key": row["keys"][0],
        }
        for row, image, mask in zip(rows, images, masks, strict=True)
    ]


def two_panels(image: np.ndarray, mask: np.ndarray, classes: int) -> str:
    """Base64 PNG: the image, and the image in grey with every object of the mask in its label's colour."""
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
