"""Figures of a found trigger for the report: a preview, the images it was found in, trusted images before and after."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from roclip.found_triggers import FoundTrigger
from roclip.oracle.held_out import TrustedImages
from roclip.oracle.scan.images import ScannedImages
from roclip.oracle.scan.scorer import Scorer

SHOWN = 8
_SIDE_PX, _CROP_PX, _MARK = 128, 96, (255, 0, 90)


def trigger_figure(
    trigger: FoundTrigger, held_out: TrustedImages, scanned_images: ScannedImages, scorer: Scorer
) -> dict[str, Any]:
    """Return base64 PNGs: `png`, `sources` (with the box drawn) and `probes`, each with the model's answers."""
    rng = np.random.default_rng(0)
    target = scorer.labels.index(trigger.target)
    rows = np.flatnonzero(~held_out.shows[:, target])[: 4 * SHOWN]
    before = scorer.scores(held_out.images[rows]).argmax(axis=1) if len(rows) else np.empty(0, int)
    rows, before = (values[before != target][:SHOWN] for values in (rows, before))
    changed = [trigger.apply(held_out.images[row], rng)[0] for row in rows]
    after = scorer.scores(np.stack(changed)).argmax(axis=1) if changed else np.empty(0, int)
    sources = trigger.sources[:SHOWN]
    images = scanned_images.read(np.array([source.image for source in sources], dtype=int))
    return {
        "png": _png(_enlarged(trigger.preview(), _CROP_PX)),
        "sources": [_png(_boxed(image, source.box)) for image, source in zip(images, sources, strict=True)],
        "probes": [
            {
                "before": _png(_enlarged(held_out.images[row], _SIDE_PX)),
                "after": _png(_enlarged(stamped, _SIDE_PX)),
                "said": scorer.labels[answer_before],
                "says": scorer.labels[answer_after],
                "flipped": bool(answer_after == target),
            }
            for row, answer_before, stamped, answer_after in zip(rows, before, changed, after, strict=True)
        ],
    }


def _boxed(image: np.ndarray, box: tuple[int, int, int, int]) -> Image.Image:
    large = _enlarged(image, _SIDE_PX)
    scale = large.width / image.shape[1]
    edges = [round(edge * scale) for edge in box]
    ImageDraw.Draw(large).rectangle((edges[0] - 2, edges[1] - 2, edges[2] + 1, edges[3] + 1), outline=_MARK, width=2)
    return large


def _enlarged(pixels: np.ndarray, side_px: int) -> Image.Image:
    """Scale to a longer side of about `side_px`, small images with nearest-neighbour so that their pixels stay visible."""
    image = Image.fromarray(pixels)
    times = side_px / max(image.size)
    size = (max(1, round(image.width * times)), max(1, round(image.height * times)))
    return image.resize(size, Image.Resampling.NEAREST if times > 3 else Image.Resampling.BICUBIC)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.quantize(128).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
