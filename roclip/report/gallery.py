"""Samples of a run for a report: read from the shards, scaled down, with triggers marked."""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from roclip.data.shards import Manifest, read_index, tar_path

THUMB_PX = 224
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class GalleryImage:
    """One stored sample."""

    key: str
    source: str
    """data: URI of the image, at most `THUMB_PX` wide or high."""
    caption: str
    attack: str = ""
    source_label: str = ""
    """What a poisoned image shows."""
    target_label: str = ""
    """What its caption says."""
    box: Box | None = None
    """The trigger: left, top, width and height in percent of the image."""
    size_px: tuple[int, int] = (0, 0)
    """Width and height as stored."""


def sample_images(shards: Path, count: int, without: Iterable[str] = ()) -> list[GalleryImage]:
    """The first usable samples of each shard, `count` in all, without the given keys."""
    records, skipped = Manifest(shards).records(), set(without)
    found: list[GalleryImage] = []
    for place, record in enumerate(records):
        if len(found) >= count:
            break
        wanted = math.ceil((count - len(found)) / (len(records) - place))
        batches = read_index(shards, record.name).to_batches(64)
        rows = (row for batch in batches for row in batch.to_pylist() if row["key"] not in skipped)
        found += _take(tar_path(shards, record), rows, wanted)
    return found


def images_of(
    shards: Path, shard: str, keys: Iterable[str], boxes: Mapping[str, Sequence[int] | None]
) -> list[GalleryImage]:
    """Samples of one shard by their keys, each with its box if it has one (left, top, right, bottom, in pixels as stored)."""
    record = Manifest(shards).get(shard)
    if record is None:
        return []
    wanted = pc.field("key").isin(pa.array(list(keys), pa.string()))
    rows = read_index(shards, shard).filter(wanted).to_pylist()
    images = _take(tar_path(shards, record), rows, len(rows))
    return [replace(image, box=_in_percent(boxes.get(image.key), image.size_px)) for image in images]


def poison_images(shards: Path, truth: Path, count: int, resize_mode: str = "border") -> list[GalleryImage]:
    """`count` poisoned samples of each attack with different labels; empty without a ground truth.

    `truth` is the parquet with the columns key, attack, target_label, source_label and trigger_box (left,
    top, right, bottom, in pixels of the original image).
    """
    if not truth.exists():
        return []
    columns = ["key", "attack", "target_label", "source_label", "trigger_box"]
    poisons = {row["key"]: row for row in pq.read_table(truth, columns=columns).to_pylist()}
    found: dict[str, list[GalleryImage]] = {}
    shown: set[tuple] = set()
    for record in Manifest(shards).records():
        here = pc.field("key").isin(pa.array(list(poisons), pa.string()))
        for row in read_index(shards, record.name).filter(here).to_pylist():
            poison = poisons[row["key"]]
            chosen = found.setdefault(poison["attack"], [])
            kind = (poison["attack"], poison["source_label"], poison["target_label"])
            if len(chosen) >= count or kind in shown:
                continue
            for image in _take(tar_path(shards, record), [row], 1):
                box = _box(shards, record.name, row["key"], poison["trigger_box"], resize_mode)
                labels = {name: poison[name] or "" for name in ("attack", "source_label", "target_label")}
                chosen.append(replace(image, **labels, box=box))
                shown.add(kind)
    return [image for chosen in found.values() for image in chosen]


def poison_keys(truth: Path) -> set[str]:
    """The keys in the ground truth; empty without one."""
    return set(pq.read_table(truth, columns=["key"])["key"].to_pylist()) if truth.exists() else set()


def _take(tar: Path, rows: Iterable[Mapping[str, Any]], count: int) -> list[GalleryImage]:
    """The first `count` index rows whose image can be decoded."""
    return [image for image, _ in zip(_read(tar, rows), range(count), strict=False)] if count > 0 else []


def _read(tar: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[GalleryImage]:
    with tar.open("rb") as file:
        for row in rows:
            file.seek(row["image_offset"])
            encoded = file.read(row["image_size"])
            file.seek(row["caption_offset"])
            caption = file.read(row["caption_size"]).decode("utf-8", "replace")
            try:
                source = thumbnail(encoded)
                size_px = Image.open(io.BytesIO(encoded)).size
            except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
                continue
            yield GalleryImage(row["key"], source, caption, size_px=size_px)


def thumbnail(encoded: bytes) -> str:
    """An encoded image as a small JPEG in a data: URI."""
    image = Image.open(io.BytesIO(encoded))
    image = image.convert("RGB")
    image.thumbnail((THUMB_PX, THUMB_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _in_percent(box: Sequence[int] | None, size_px: tuple[int, int]) -> Box | None:
    if not box:
        return None
    left, top, right, bottom = (100 * edge / size_px[side % 2] for side, edge in enumerate(box))
    return left, top, right - left, bottom - top


def _box(shards: Path, tar: str, key: str, trigger: list[int] | None, resize_mode: str) -> Box | None:
    """The trigger's box in the stored image, which img2dataset has resized about its centre."""
    if not trigger:
        return None
    columns = ["key", "width", "height", "original_width", "original_height"]
    table = pq.read_table(shards / f"{Path(tar).stem}.parquet", columns=columns, filters=[("key", "==", key)])
    if not len(table) or None in table.to_pylist()[0].values():
        return None
    sizes = table.to_pylist()[0]
    stored, original = (sizes["width"], sizes["height"]), (sizes["original_width"], sizes["original_height"])
    fit = max if resize_mode == "center_crop" else min
    scale = fit(stored[0] / original[0], stored[1] / original[1])
    left, top, right, bottom = (
        100 * ((stored[axis] - original[axis] * scale) / 2 + trigger[side] * scale) / stored[axis]
        for side, axis in enumerate((0, 1, 0, 1))
    )
    return left, top, right - left, bottom - top
