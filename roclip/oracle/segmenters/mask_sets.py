"""Readers of trusted images with masks, on which an oracle is trained or calibrated.

    RUN/origin/                   trusted.parquet (image, mask) and labels.json, as ingest prepares them
    FOLDER/                       a parquet (image, mask) and labels.json
    FOLDER/                       images/NAME.jpg|png|webp, masks/NAME.png and labels.json
    FILE.parquet                  image and mask, with labels.json beside it
    FILE.parquet                  product photos on white with a column of labels: the product is what is not white

A mask holds class indices, 0 for background; labels.json lists the classes from 1 on, optionally preceded by a background.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from roclip.attacks.foregrounds import foreground, letterbox, stands_on_white
from roclip.errors import ConfigError, DataError
from roclip.storage import sha256_file

LABELS = "labels.json"
BACKGROUNDS = ("null", "background", "__background__", "bg", "unlabeled")
"""Names by which a list of classes may call its background."""
MIN_PHOTOS = 50
"""A label with fewer photos on white is left out, because it could not be calibrated."""
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, eq=False)
class MaskSet:
    """N encoded images with masks."""

    name: str
    labels: tuple[str, ...]
    images: list[bytes]
    masks: list[bytes]
    """Encoded class indices: 0 is background, 1 + labels.index(label) an object."""
    rows: list[int]
    """Row of each image in its file."""
    sha256: str
    """Digest of that file, or over all files of a folder."""


@dataclass(frozen=True)
class PhotoColumns:
    """Columns of a parquet of product photos on white, and the size they are fitted to."""

    image: str = "image"
    label: str = "label"
    size_px: int = 96
    """Side of the white square that the photos are fitted into."""


def read_masks(
    source: Path,
    labels: Sequence[str] = (),
    *,
    photos: PhotoColumns = PhotoColumns(),
    limit: int = 0,
    seed: int = 0,
) -> MaskSet:
    """Read the images and masks of any source listed above, or a seeded sample of `limit` of them.

    Args:
        labels: Class names that replace those of labels.json or of the label column.

    Raises `DataError` for any other kind of source, and for one without images.
    """
    if source.is_dir():
        found = _read_folder(source, labels)
    elif source.is_file() and "mask" in _columns(source):
        found = read_parquet(source, labels or _labels_beside(source))
    elif source.is_file():
        found = _read_photos(source, labels, photos, limit, seed)
    else:
        raise DataError(f"{source}: expected images with masks, got nothing there. Name a parquet or a folder.")
    if not found.images:
        raise DataError(f"{source}: expected images with masks, got none.")
    return _sample(found, limit, seed)


def read_parquet(path: Path, labels: Sequence[str]) -> MaskSet:
    """Read a parquet with columns image and mask, whose masks index these labels. Raises `DataError`."""
    try:
        table = pq.read_table(path, columns=["image", "mask"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: expected a parquet with columns image and mask, got {error}.") from error
    rows = list(range(len(table)))
    return MaskSet(
        str(path), tuple(labels), table["image"].to_pylist(), table["mask"].to_pylist(), rows, sha256_file(path)
    )


def read_labels(path: Path) -> list[str]:
    """Read class names in order from a JSON list, the `labels` of a JSON object, or a text file with one name per line.

    Raises `ConfigError`.
    """
    try:
        text = path.read_text()
        found: Any = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
        names = [str(name) for name in (found["labels"] if isinstance(found, dict) else found) if name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected class names (a JSON list, or a text file with one per line), got {error!r}."
        ) from error
    if not names or len(set(names)) != len(names):
        raise ConfigError(
            f"{path}: expected distinct class names, got {len(names)} names of which {len(set(names))} are distinct."
        )
    return names


def without_background(classes: Sequence[str]) -> list[str]:
    """Return the classes without a leading background."""
    return list(classes[1:] if classes and classes[0].casefold() in BACKGROUNDS else classes)


def _read_folder(folder: Path, labels: Sequence[str]) -> MaskSet:
    origin = folder / "origin" if (folder / "origin").is_dir() else folder
    labels = labels or _labels_beside(origin / "any")
    tables = [path for path in sorted(origin.glob("*.parquet")) if "mask" in _columns(path)]
    if len(tables) == 1:
        return read_parquet(tables[0], labels)
    if tables or not (folder / "images").is_dir() or not (folder / "masks").is_dir():
        raise DataError(
            f"{folder}: expected one parquet with a column mask, or the folders images and masks, got "
            f"{', '.join(path.name for path in tables) or 'neither'}."
        )
    pairs, state = [], hashlib.sha256()
    for image in sorted(path for path in (folder / "images").iterdir() if path.suffix.lower() in _SUFFIXES):
        mask = folder / "masks" / f"{image.stem}.png"
        if not mask.is_file():
            raise DataError(f"{image}: expected its mask {mask}, got none. Take the image out or add the mask.")
        pairs.append((image.read_bytes(), mask.read_bytes()))
        for content in pairs[-1]:
            state.update(len(content).to_bytes(8, "big") + content)
    images, masks = ([pair[place] for pair in pairs] for place in (0, 1))
    return MaskSet(str(folder), tuple(labels), images, masks, list(range(len(pairs))), state.hexdigest())


def _read_photos(path: Path, labels: Sequence[str], photos: PhotoColumns, limit: int, seed: int) -> MaskSet:
    """Read photos on white of the labels, fitted into a square, each with its product as the mask."""
    missing = {photos.image, photos.label} - set(_columns(path))
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(sorted(missing))} and no column mask; it has {', '.join(_columns(path))}. Name "
            "the column of the labels."
        )
    table = pq.read_table(path, columns=[photos.image, photos.label])
    shown, encoded = table[photos.label].to_pylist(), table[photos.image].to_pylist()
    frequent = sorted(label for label, number in Counter(shown).items() if label and number >= MIN_PHOTOS)
    chosen = tuple(labels or frequent)
    images, masks, rows = [], [], []
    for row in np.random.default_rng((seed, 63)).permutation(len(shown)).tolist():
        if limit and len(rows) == limit:
            break
        if shown[row] in chosen and stands_on_white(encoded[row]):
            images.append(letterbox(encoded[row], photos.size_px))
            masks.append(foreground(images[-1], 1 + chosen.index(shown[row])))
            rows.append(row)
    return MaskSet(str(path), chosen, images, masks, rows, sha256_file(path))


def _sample(found: MaskSet, limit: int, seed: int) -> MaskSet:
    if not limit or len(found.images) <= limit:
        return found
    chosen = np.sort(np.random.default_rng((seed, 63)).permutation(len(found.images))[:limit]).tolist()
    images, masks, rows = ([values[n] for n in chosen] for values in (found.images, found.masks, found.rows))
    return MaskSet(found.name, found.labels, images, masks, rows, found.sha256)


def _labels_beside(path: Path) -> list[str]:
    beside = path.with_name(LABELS)
    if not beside.is_file():
        raise DataError(
            f"{beside}: expected the class names of the masks, got no file. Write it, or pass the class names."
        )
    return without_background(read_labels(beside))


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a parquet, got {error}.") from error
