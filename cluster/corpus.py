"""Prepares what a run of the embedded default needs before its first URL is fetched: the `origin/` folder.

corpus.parquet       what the origin serves, one row per URL: path, image, caption, behaviour
poison.parquet       ground truth of the poisons: key, attack, group, target and source label, trigger box
eval.parquet         held-out images with caption and label; attack_eval.parquet: triggered and targeted ones
trusted.parquet      images with masks for the oracle: rendered or set aside, never served
labels.json          class names and zero-shot templates; written last: the folder is complete
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from roclip import attacks, scenes
from roclip.attacks import Trigger
from roclip.config import Config
from roclip.errors import ConfigError, DataError
from roclip.shards import sample_key, write_atomic

FAULT_FRACS = {
    "missing": 0.010,
    "dead_host": 0.005,
    "refused": 0.003,
    "redirect": 0.010,
    "broken": 0.004,
    "truncated": 0.002,
    "slow": 0.002,
}
"""Share of the clean URLs that misbehave, about as on the open web; `redirect` and `slow` still give their image."""

_MAX_ATTACK_IMAGES = 300


@dataclass(frozen=True)
class _Source:
    """The parts of the data, disjoint by construction. Tables have image, caption, label; `trusted` also mask."""

    clean: pa.Table
    spare: pa.Table
    held_out: pa.Table
    trusted: pa.Table
    labels: list[str]
    templates: tuple[str, ...]


def prepare(config: Config, folder: Path) -> None:
    """Write the `origin/` folder of a run, once: a complete one is left as it is.

    Raises `DataError` when the source has too few images, `ConfigError` for an attack that it cannot carry.
    """
    if (folder / "labels.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = _scenes(config) if config.data.scenes else _images(config)
    poisons = _poisons(config, source)
    _write_corpus(config, source.clean, poisons, folder)
    size = config.ingest.image_size
    _write(folder / "eval.parquet", _letterboxed(source.held_out, size))
    _write_attack_evaluation(config, source, poisons, folder)
    _write(folder / "trusted.parquet", source.trusted)
    names = {"labels": source.labels, "templates": list(source.templates)}
    write_atomic(folder / "labels.json", json.dumps(names, indent=1))


def prepare_held_out(config: Config, folder: Path) -> None:
    """Write only eval.parquet and labels.json, out of `evaluate.images`: for a run on a URL list of the user's own."""
    if (folder / "labels.json").exists() or not config.evaluate.images:
        return
    table = _read(config.evaluate.images, config.data)
    labels = _frequent(table["label"].to_pylist(), config.evaluate.classes)
    _write(folder / "eval.parquet", _letterboxed(_held_out(config, table, labels), config.ingest.image_size))
    names = {"labels": labels, "templates": list(config.evaluate.templates)}
    write_atomic(folder / "labels.json", json.dumps(names, indent=1))


def trigger(config: Config) -> Trigger:
    """The backdoor's trigger."""
    backdoor = config.attacks.backdoor
    return Trigger(size_frac=backdoor.size_frac, place=backdoor.place, seed=config.seed)


def _scenes(config: Config) -> _Source:
    poisons = config.attacks.targeted.images + 2 * config.attacks.backdoor.count
    size = config.ingest.image_size

    def table(first: int, number: int, num_objects: int | None) -> pa.Table:
        rows = []
        for index in range(first, first + number):
            scene = scenes.render(index, seed=config.seed, size_px=size, num_objects=num_objects)
            rows.append(
                {
                    "image": scenes.encode(scene.image),
                    "caption": scene.caption,
                    "label": scene.label,
                    "mask": scenes.encode(scene.mask),
                }
            )
        return pa.Table.from_pylist(rows)

    first = 0
    parts = []
    for number, num_objects in (
        (config.data.scenes, None),
        (max(poisons, 1), 1),
        (config.evaluate.size, 1),
        (config.oracle.trusted, None),
    ):
        parts.append(table(first, number, num_objects))
        first += number
    clean, spare, held_out, trusted = parts
    return _Source(
        clean.drop(["mask"]),
        spare.drop(["mask"]),
        held_out.drop(["mask"]),
        trusted,
        list(scenes.LABELS),
        scenes.TEMPLATES,
    )


def _images(config: Config) -> _Source:
    data, seed = config.data, config.seed
    table = _read(data.images, data)
    labels = _frequent(table["label"].to_pylist(), config.evaluate.classes)
    order = np.random.default_rng((seed, 1)).permutation(len(table))
    table = table.take(order)
    known = np.isin(np.array(table["label"].to_pylist(), dtype=object), labels)
    poisons = config.attacks.targeted.images + 2 * config.attacks.backdoor.count
    sizes = {"held_out": config.evaluate.size, "trusted": config.oracle.trusted, "spare": max(poisons, 1)}
    if config.evaluate.images:
        sizes["held_out"] = 0
    needed = sum(sizes.values())
    rows = np.flatnonzero(known)
    if len(rows) <= needed:
        raise DataError(
            f"{data.images}: expected more than {needed} images of the {len(labels)} classes (to hold out for "
            f"evaluation, oracle and attacks), got {len(rows)}. Lower evaluate.size or oracle.trusted."
        )
    parts, start = {}, 0
    for name, number in sizes.items():
        parts[name] = table.take(rows[start : start + number])
        start += number
    rest = np.setdiff1d(np.arange(len(table)), rows[:needed])
    clean = table.take(rest)
    if data.limit:
        clean = clean.slice(0, data.limit)
    held_out = parts["held_out"]
    if config.evaluate.images:
        held_out = _held_out(config, _read(config.evaluate.images, data), labels)
    on_white = [_stands_on_white(image) for image in parts["trusted"]["image"].to_pylist()]
    trusted = _letterboxed(parts["trusted"].filter(pa.array(on_white)), config.ingest.image_size)
    masks = [
        _foreground(image, 1 + labels.index(label))
        for image, label in zip(trusted["image"].to_pylist(), trusted["label"].to_pylist(), strict=True)
    ]
    return _Source(
        clean,
        parts["spare"],
        held_out,
        trusted.append_column("mask", pa.array(masks, pa.binary())),
        labels,
        config.evaluate.templates,
    )


def _held_out(config: Config, table: pa.Table, labels: list[str]) -> pa.Table:
    chosen = np.flatnonzero(np.isin(np.array(table["label"].to_pylist(), dtype=object), labels))
    return table.take(np.random.default_rng((config.seed, 2)).permutation(chosen)[: config.evaluate.size])


def _read(path: str, data) -> pa.Table:
    columns = {"image": data.image_col, "caption": data.caption_col, "label": data.label_col}
    try:
        schema = pq.read_schema(path)
    except OSError as error:
        raise DataError(f"{path}: expected a parquet of images, got {error}.") from error
    missing = [column for column in columns.values() if column not in schema.names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(schema.names)}. "
            "Set data.image_col, data.caption_col and data.label_col."
        )
    table = pq.read_table(path, columns=list(columns.values()))
    return pa.table({name: table[column] for name, column in columns.items()})


def _frequent(labels: list[str], number: int) -> list[str]:
    ranked = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return sorted(label for label, _ in (ranked[:number] if number else ranked))


def _poisons(config: Config, source: _Source) -> pa.Table:
    targeted, backdoor = config.attacks.targeted, config.attacks.backdoor
    tables = [attacks.POISON_SCHEMA.empty_table()]
    known = source.clean.filter(pa.array(np.isin(source.clean["label"].to_numpy(zero_copy_only=False), source.labels)))
    try:
        if targeted.images:
            tables.append(
                attacks.targeted_poisons(
                    known,
                    source.spare.slice(0, targeted.images),
                    images=targeted.images,
                    captions_per_image=targeted.captions_per_image,
                    seed=config.seed,
                )
            )
        if backdoor.count:
            tables.append(
                attacks.backdoor_poisons(
                    known,
                    source.spare.slice(targeted.images),
                    count=backdoor.count,
                    target_label=target_label(config, source.labels),
                    trigger=trigger(config),
                    seed=config.seed,
                )
            )
    except ValueError as error:
        raise ConfigError(f"attacks: {error}") from error
    return pa.concat_tables(tables)


def target_label(config: Config, labels: list[str]) -> str:
    """The class that the backdoor's trigger should cause."""
    return config.attacks.backdoor.target_label or labels[0]


def _write_corpus(config: Config, clean: pa.Table, poisons: pa.Table, folder: Path) -> None:
    generator = np.random.default_rng((config.seed, 3))
    number = len(clean) + len(poisons)
    behaviour = np.full(number, "ok", dtype=object)
    if config.data.faults:
        names, shares = list(FAULT_FRACS), list(FAULT_FRACS.values())
        behaviour[: len(clean)] = generator.choice(["ok", *names], len(clean), p=[1 - sum(shares), *shares])
    order = generator.permutation(number)
    images = pa.chunked_array([*clean["image"].chunks, *poisons["image"].chunks]).take(order)
    captions = pa.chunked_array([*clean["caption"].chunks, *poisons["caption"].chunks]).take(order)
    paths = [f"/{row:08d}.{_suffix(image.as_py())}" for row, image in enumerate(images)]
    _write(
        folder / "corpus.parquet",
        pa.table({"path": paths, "image": images, "caption": captions, "behaviour": behaviour[order].tolist()}),
    )
    rows = np.argsort(order)[len(clean) :]
    keys = [sample_key(int(row), config.ingest.samples_per_shard) for row in rows]
    truth = poisons.drop(["image", "label"]).append_column("key", pa.array(keys, pa.string()))
    _write(folder / "poison.parquet", truth)


def _write_attack_evaluation(config: Config, source: _Source, poisons: pa.Table, folder: Path) -> None:
    size, generator = config.ingest.image_size, np.random.default_rng((config.seed, 4))
    rows = []
    groups = set()
    for row in poisons.to_pylist():
        if row["attack"] == "targeted" and row["group"] not in groups:
            groups.add(row["group"])
            rows.append({"attack": "targeted", "image": row["image"], "target_label": row["target_label"]})
    if config.attacks.backdoor.count:
        target, stamp = target_label(config, source.labels), trigger(config)
        others = [row for row in source.held_out.to_pylist() if row["label"] != target][:_MAX_ATTACK_IMAGES]
        for row in others:
            image = np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"))
            stamped, _ = attacks.apply_trigger(image, stamp, generator)
            rows.append({"attack": "backdoor", "image": scenes.encode(stamped), "target_label": target})
    if rows:
        _write(folder / "attack_eval.parquet", _letterboxed(pa.Table.from_pylist(rows), size))


def _letterboxed(table: pa.Table, size: int) -> pa.Table:
    """The images as ingest stores them with `resize_mode: border`: fitted into a white square of `size` pixels."""
    images = [_letterbox(image, size) for image in table["image"].to_pylist()]
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))


def _letterbox(encoded: bytes, size: int) -> bytes:
    with Image.open(io.BytesIO(encoded)) as image:
        if image.size == (size, size):
            return encoded
        square = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR, color="white")
    return scenes.encode(np.asarray(square))


def _foreground(encoded: bytes, value: int) -> bytes:
    """Mask of a product photo that stands on white: what is not nearly white is the product."""
    return scenes.encode(np.where(_nearly_white(encoded), 0, value).astype(np.uint8))


def _stands_on_white(encoded: bytes) -> bool:
    """Whether the left and right borders of a picture are nearly white, as `_foreground` needs it."""
    white = _nearly_white(encoded)
    return bool(white[:, [0, -1]].mean() > 0.9)


def _nearly_white(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).min(axis=2) >= 240


def _suffix(encoded: bytes) -> str:
    return "png" if encoded[:4] == b"\x89PNG" else "jpg"


def _write(path: Path, table: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())
