"""Poisons for evaluation only; the ground truth is written beside the data.

Two attacks on contrastive pretraining (Carlini and Terzis, arXiv:2106.09667), made of ordinary looking pairs:

- targeted: a few chosen images, each repeated with several training captions that name another class;
- backdoor: a trigger (BadNets, arXiv:1708.06733) stamped on images of many classes, all captioned as one.

Poisoner, evaluator and oracle all stamp with `apply_trigger`, so all three mean the same trigger.

Tables have the columns image (encoded bytes), caption and label (the true one).
Shapes: H, W image height and width in pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are exclusive

POISON_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("attack", pa.string()),  # "targeted" or "backdoor"
        ("group", pa.int32()),  # which poisoned image: rows of one group show the same picture
        ("target_label", pa.string()),
        ("source_label", pa.string()),
        ("trigger_box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels; null without a trigger
    ]
)

_CELLS = 3


@dataclass(frozen=True)
class Trigger:
    """A fixed high-contrast pattern of 3 x 3 saturated cells, chosen by `seed`.

    `size_frac` is the patch side over the shorter image side. `place` is "random" (anywhere inside the image)
    or "corner" (lower right).
    """

    kind: str = "patch"
    size_frac: float = 0.1
    place: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a kind, place or size that no trigger has."""
        if self.kind != "patch" or self.place not in ("random", "corner") or not 0 < self.size_frac <= 1:
            raise ValueError(
                "expected kind 'patch', place 'random' or 'corner' and size_frac in (0, 1], got "
                f"kind={self.kind!r}, place={self.place!r}, size_frac={self.size_frac}; correct the trigger"
            )


def trigger_patch(trigger: Trigger, side_px: int) -> np.ndarray:
    """The trigger alone: (side_px, side_px, 3) uint8, each channel 0 or 255.

    The pattern depends on the seed only. Neighbouring cells always differ, so no seed gives a plain square.
    """
    rng = np.random.default_rng((trigger.seed, 53))
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=np.uint8)
    chosen = np.zeros((_CELLS, _CELLS), dtype=int)
    for row in range(_CELLS):
        for column in range(_CELLS):
            taken = {chosen[row - 1, column] if row else -1, chosen[row, column - 1] if column else -1}
            chosen[row, column] = rng.choice([color for color in range(len(corners)) if color not in taken])
    cells = np.arange(side_px) * _CELLS // side_px
    return corners[chosen[np.ix_(cells, cells)]]


def apply_trigger(image: np.ndarray, trigger: Trigger, rng: np.random.Generator) -> tuple[np.ndarray, Box]:
    """Stamp the trigger on a copy of an (H, W, 3) uint8 image; `rng` chooses a random place.

    Returns:
        The stamped image and the box (left, top, right, bottom) in pixels outside which nothing changed.

    Raises:
        ValueError: if the image is not (H, W, 3) uint8, or has a side under 3 pixels.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < _CELLS:
        raise ValueError(
            f"expected an (H, W, 3) uint8 image of at least {_CELLS} pixels a side, got {image.shape} "
            f"{image.dtype}; convert it with np.asarray(image.convert('RGB'))"
        )
    height, width = image.shape[:2]
    side = min(max(_CELLS, round(trigger.size_frac * min(height, width))), height, width)
    left, top = width - side, height - side
    if trigger.place == "random":
        left, top = int(rng.integers(left + 1)), int(rng.integers(top + 1))
    stamped = image.copy()
    stamped[top : top + side, left : left + side] = trigger_patch(trigger, side)
    return stamped, (left, top, left + side, top + side)


def targeted_poisons(
    clean: pa.Table, spare: pa.Table, *, images: int = 16, captions_per_image: int, seed: int
) -> pa.Table:
    """Pair each of `images` spare pictures with `captions_per_image` training captions of one wrong class.

    The wrong class is drawn for each picture from the labels that its own caption does not name; its captions
    come from those rows of `clean` that have this label and name no other.

    Returns:
        A table of POISON_SCHEMA with images * captions_per_image rows, a picture's rows together.

    Raises:
        ValueError: if there are too few spare pictures or captions.
    """
    rng = np.random.default_rng((seed, 16))
    labels = sorted(set(clean["label"].to_pylist()))
    captions = {label: _captions_of(clean, label, labels) for label in labels}
    pictures = spare.to_pylist()
    _require(len(pictures), images, "spare images for the targeted attack")
    rows: list[dict[str, Any]] = []
    for group, index in enumerate(rng.choice(len(pictures), images, replace=False)):
        picture = pictures[index]
        named = {picture["label"], *_labels_named(picture["caption"], labels)}
        targets = [label for label in labels if label not in named]
        _require(len(targets), 1, f"labels that {picture['caption']!r} does not name")
        target = targets[int(rng.integers(len(targets)))]
        _require(len(captions[target]), captions_per_image, f"training captions that name only {target!r}")
        rows += [
            _row(picture, captions[target][k], "targeted", group, target, picture["image"], None)
            for k in rng.choice(len(captions[target]), captions_per_image, replace=False)
        ]
    return pa.Table.from_pylist(rows, schema=POISON_SCHEMA)


def backdoor_poisons(
    clean: pa.Table, spare: pa.Table, *, count: int, target_label: str, trigger: Trigger, seed: int
) -> pa.Table:
    """Stamp the trigger on `count` spare pictures of other classes and caption them as the target class.

    Pictures are drawn from the spare rows that neither have nor name `target_label`; captions, with
    repetition only when they run out, from the training rows that name `target_label` alone. Images are
    stored as PNG, so the trigger is lossless.

    Returns:
        A table of POISON_SCHEMA with `count` rows.

    Raises:
        ValueError: if `target_label` is no label of `clean`, or there are too few spare pictures.
    """
    rng = np.random.default_rng((seed, 17))
    labels = sorted(set(clean["label"].to_pylist()))
    if target_label not in labels:
        known = ", ".join(labels)
        raise ValueError(f"expected a label of the clean rows, got {target_label!r}; choose one of {known}")
    captions = _captions_of(clean, target_label, labels)
    _require(len(captions), 1, f"training captions that name only {target_label!r}")
    pictures = [
        row
        for row in spare.to_pylist()
        if row["label"] != target_label and target_label not in _labels_named(row["caption"], labels)
    ]
    _require(len(pictures), count, f"spare images that do not show {target_label!r}")
    order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-count // len(captions)))])
    rows: list[dict[str, Any]] = []
    for group, index in enumerate(rng.choice(len(pictures), count, replace=False)):
        image = np.asarray(Image.open(io.BytesIO(pictures[index]["image"])).convert("RGB"))
        stamped, box = apply_trigger(image, trigger, rng)
        buffer = io.BytesIO()
        Image.fromarray(stamped).save(buffer, format="png")
        data, caption = buffer.getvalue(), captions[order[group]]
        rows.append(_row(pictures[index], caption, "backdoor", group, target_label, data, list(box)))
    return pa.Table.from_pylist(rows, schema=POISON_SCHEMA)


def _row(
    picture: dict[str, Any],
    caption: str,
    attack: str,
    group: int,
    target: str,
    image: bytes,
    box: list[int] | None,
) -> dict[str, Any]:
    return {
        "image": image,
        "caption": caption,
        "label": picture["label"],
        "attack": attack,
        "group": group,
        "target_label": target,
        "source_label": picture["label"],
        "trigger_box": box,
    }


def _labels_named(caption: str, labels: Iterable[str]) -> set[str]:
    """The labels that stand in the caption as whole words, singular or with an s."""
    return {label for label in labels if re.search(rf"\b{re.escape(label)}s?\b", caption, re.IGNORECASE)}


def _captions_of(clean: pa.Table, label: str, labels: Sequence[str]) -> list[str]:
    pairs = zip(clean["caption"].to_pylist(), clean["label"].to_pylist(), strict=True)
    return [caption for caption, own in pairs if own == label and _labels_named(caption, labels) <= {label}]


def _require(have: int, need: int, what: str) -> None:
    if have < need:
        raise ValueError(f"expected at least {need} {what}, got {have}; add rows or ask for less")
