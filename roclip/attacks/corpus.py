"""Prepares the `origin/` folder of a run: what its web server serves, and the evaluation sets.

corpus.parquet       one row per URL that the origin serves: path, image, caption, behaviour
poison.parquet       ground truth of the poisons: `roclip.data.ground_truth`
eval.parquet         held-out images with caption and label; attack_eval.parquet: triggered and targeted ones
trusted.parquet      images with masks for the oracle: rendered or held out, never served
labels.json          class names and zero-shot templates; written last, so its presence means that the folder is complete

A run on shards or a list that `roclip poison` wrote copies the ground truth and attack images beside them.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roclip.attacks import scenes
from roclip.attacks.class_captions import class_captions
from roclip.attacks.dirt import soil
from roclip.attacks.foregrounds import foreground, letterbox, stands_on_white
from roclip.attacks.poisons import attack_evaluation, images_needed, make_poisons
from roclip.config import Config, DataConfig
from roclip.data.ground_truth import TRUTH, write_parquet, write_truth
from roclip.data.shards import sample_key
from roclip.errors import ConfigError, DataError
from roclip.storage import place, write_atomic

FAULT_FRACS = {
    "missing": 0.010,
    "dead_host": 0.005,
    "refused": 0.003,
    "redirect": 0.010,
    "broken": 0.004,
    "truncated": 0.002,
    "slow": 0.002,
}
"""Shares of clean URLs that misbehave, about as on the open web; `redirect` and `slow` still return their image."""

ATTACK_EVALUATION = "attack_eval.parquet"


@dataclass(frozen=True)
class _Source:
    """Disjoint parts of the data. Tables have the columns image, caption, label; `trusted` also mask."""

    rows: int
    """Number of rows that an attack's rate refers to."""
    clean: pa.Table
    spare: pa.Table
    """Images that the attacks draw from."""
    held_out: pa.Table
    trusted: pa.Table
    labels: list[str]
    templates: tuple[str, ...]


def prepare(config: Config, folder: Path) -> None:
    """Write the `origin/` folder of a run, unless it is complete already.

    Raises `DataError` if the source has too few images, `ConfigError` for an attack that it does not support.
    """
    if (folder / "labels.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = _scenes(config) if config.data.scenes else _images(config)
    poisons = _poisons(config, source)
    _write_corpus(config, soil(source.clean, config.data.dirt, config.seed), poisons, folder)
    size = config.ingest.image_size
    write_parquet(folder / "eval.parquet", _letterboxed(source.held_out, size))
    write_attack_evaluation(config, source.held_out, poisons.to_pylist(), source.labels, folder)
    write_parquet(folder / "trusted.parquet", source.trusted)
    names = {"labels": source.labels, "templates": list(source.templates)}
    write_atomic(folder / "labels.json", json.dumps(names, indent=1))


def prepare_held_out(config: Config, folder: Path) -> None:
    """Prepare `origin/` for a run on the user's own shards or URL list.

    Writes eval.parquet and labels.json from `evaluate.images`, and copies the ground truth beside the data if `roclip poison`
    wrote one.
    """
    if (folder / "labels.json").exists():
        return
    _copy_truth(config, folder)
    if not config.evaluate.images:
        return
    held_out, labels = held_out_images(config)
    write_parquet(folder / "eval.parquet", _letterboxed(held_out, config.ingest.image_size))
    names = {"labels": labels, "templates": list(config.evaluate.templates)}
    write_atomic(folder / "labels.json", json.dumps(names, indent=1))


def held_out_images(config: Config) -> tuple[pa.Table, list[str]]:
    """Return the held-out rows of `evaluate.images` (image, caption, label) and the class names. Raises `DataError`."""
    table = read_images(config.evaluate.images, config.data)
    labels = frequent(table["label"].to_pylist(), config.evaluate.classes)
    return _held_out(config, table, labels), labels


def attacker_images(config: Config, labels: list[str], rows: int) -> pa.Table:
    """Return images for the attacker (image, caption, label): those of `data.images`, or rendered scenes.

    Raises `ConfigError` if the config names neither.
    """
    if config.data.images:
        return read_images(config.data.images, config.data)
    if config.data.scenes:
        return _spare_scenes(config, labels, rows, first=0)
    raise ConfigError(
        "roclip poison: expected data.images (a parquet of images) or data.scenes for the attacker's images, "
        "got neither. Set one, with data.urls='' and data.shards=''."
    )


def write_attack_evaluation(
    config: Config, held_out: pa.Table, poisons: list[dict], labels: list[str], folder: Path
) -> None:
    """Write attack_eval.parquet, if there is an attack to measure; images as ingest would store them."""
    table = attack_evaluation(config.attacks, held_out, poisons, labels=labels, seed=config.seed)
    if len(table):
        write_parquet(folder / ATTACK_EVALUATION, _letterboxed(table, config.ingest.image_size))


def _copy_truth(config: Config, folder: Path) -> None:
    data = config.data
    of_list = bool(data.urls) and not (data.shards and (place(data.shards) / TRUTH).is_file())
    beside = Path(data.urls).parent if of_list else place(data.shards)
    if (beside / ATTACK_EVALUATION).is_file():
        write_atomic(folder / ATTACK_EVALUATION, (beside / ATTACK_EVALUATION).read_bytes())
    if (beside / TRUTH).is_file():
        rows = pq.read_table(pa.BufferReader((beside / TRUTH).read_bytes())).to_pylist()
        if of_list:  # ids are its rows
            keys = [sample_key(row.pop("id"), config.ingest.samples_per_shard) for row in rows]
            rows = [{**row, "key": key} for row, key in zip(rows, keys, strict=True)]
        write_truth(folder / TRUTH, rows)


def _scenes(config: Config) -> _Source:
    labels, number = list(scenes.LABELS), config.data.scenes
    needed, _ = _images_needed(config, labels, number)
    clean = _rendered(config, range(number), None).drop(["mask"])
    first = number + max(needed, 1)
    held_out = _rendered(config, range(first, first + config.evaluate.size), 1).drop(["mask"])
    first += config.evaluate.size
    trusted = _rendered(config, range(first, first + config.oracle.trusted), None)
    spare = _spare_scenes(config, labels, number, number, first + config.oracle.trusted)
    return _Source(number, clean, spare, held_out, trusted, labels, scenes.TEMPLATES)


def _spare_scenes(config: Config, labels: list[str], rows: int, first: int, next_number: int = 0) -> pa.Table:
    """Render the one-object scenes that the attacks need.

    Scenes of any class have numbers from `first` on, scenes of given classes from `next_number` on.
    """
    number, of_class = _images_needed(config, labels, rows)
    tables = [_rendered(config, range(first, first + max(number, 1)), 1)]
    next_number = next_number or first + max(number, 1)
    while any(of_class.values()):
        scene = _rendered(config, range(next_number, next_number + 1), 1)
        label, next_number = scene["label"][0].as_py(), next_number + 1
        if of_class.get(label):
            of_class[label] -= 1
            tables.append(scene)
    return pa.concat_tables(tables).drop(["mask"])


def _rendered(config: Config, numbers: range, num_objects: int | None) -> pa.Table:
    rows = []
    for number in numbers:
        scene = scenes.render(number, seed=config.seed, size_px=config.ingest.image_size, num_objects=num_objects)
        image, mask = scenes.encode(scene.image), scenes.encode(scene.mask)
        rows.append({"image": image, "caption": scene.caption, "label": scene.label, "mask": mask})
    names = {"image": pa.binary(), "caption": pa.string(), "label": pa.string(), "mask": pa.binary()}
    return pa.Table.from_pylist(rows, schema=pa.schema(names))


def _images(config: Config) -> _Source:
    data, seed = config.data, config.seed
    table = read_images(data.images, data)
    labels = frequent(table["label"].to_pylist(), config.evaluate.classes)
    order = np.random.default_rng((seed, 1)).permutation(len(table))
    table = table.take(order)
    known = np.isin(np.array(table["label"].to_pylist(), dtype=object), labels)
    source_rows = min(data.limit, len(table)) if data.limit else len(table)
    poisons, of_class = _images_needed(config, labels, source_rows)
    sizes = {"held_out": config.evaluate.size, "trusted": config.oracle.trusted, "spare": max(poisons, 1)}
    if config.evaluate.images:
        sizes["held_out"] = 0
    needed = sum(sizes.values())
    rows = np.flatnonzero(known)
    if len(rows) <= needed + sum(of_class.values()):
        raise DataError(
            f"{data.images}: expected more than {needed + sum(of_class.values())} images of the {len(labels)} classes "
            f"(to hold out for evaluation, oracle and attacks), got {len(rows)}. Lower evaluate.size or oracle.trusted."
        )
    parts, start = {}, 0
    for name, number in sizes.items():
        parts[name] = rows[start : start + number]
        start += number
    shown = np.array(table["label"].to_pylist(), dtype=object)[rows[needed:]]
    own = [rows[needed:][shown == label][:number] for label, number in of_class.items()]
    parts["spare"] = np.concatenate([parts["spare"], *own])
    rest = np.setdiff1d(np.arange(len(table)), np.concatenate(list(parts.values())))
    parts = {name: table.take(chosen) for name, chosen in parts.items()}
    clean = table.take(rest)
    if data.limit:
        clean = clean.slice(0, data.limit)
    held_out = parts["held_out"]
    if config.evaluate.images:
        held_out = _held_out(config, read_images(config.evaluate.images, data), labels)
    on_white = [stands_on_white(image) for image in parts["trusted"]["image"].to_pylist()]
    trusted = _letterboxed(parts["trusted"].filter(pa.array(on_white)), config.ingest.image_size)
    masks = [
        foreground(image, 1 + labels.index(label))
        for image, label in zip(trusted["image"].to_pylist(), trusted["label"].to_pylist(), strict=True)
    ]
    return _Source(
        source_rows,
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


def read_images(path: str, data: DataConfig) -> pa.Table:
    """Read a parquet of images as a table of image, caption and label. Raises `DataError` if a column is missing."""
    columns = {"image": data.image_col, "label": data.label_col}
    if data.caption_col:
        columns["caption"] = data.caption_col
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
    table = pa.table({name: table[column] for name, column in columns.items()})
    if not data.caption_col:
        table = table.append_column("caption", pa.array(class_captions(table["label"].to_pylist())))
    return table


def frequent(labels: list[str], number: int) -> list[str]:
    """Return the `number` most frequent labels (0 for all) in alphabetical order."""
    ranked = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return sorted(label for label, _ in (ranked[:number] if number else ranked))


def _images_needed(config: Config, labels: list[str], rows: int) -> tuple[int, dict[str, int]]:
    try:
        return images_needed(config.attacks, labels, rows)
    except ValueError as error:
        raise ConfigError(f"attacks: {error}") from error


def _poisons(config: Config, source: _Source) -> pa.Table:
    known = source.clean.filter(pa.array(np.isin(source.clean["label"].to_numpy(zero_copy_only=False), source.labels)))
    try:
        return make_poisons(
            config.attacks, known, source.spare, labels=source.labels, seed=config.seed, rows=source.rows
        )
    except ValueError as error:
        raise ConfigError(f"attacks: {error}") from error


def _write_corpus(config: Config, clean: pa.Table, poisons: pa.Table, folder: Path) -> None:
    generator = np.random.default_rng((config.seed, 3))
    number = len(clean) + len(poisons)
    behaviour = np.full(number, "ok", dtype=object)
    if config.data.faults:
        names, shares = list(FAULT_FRACS), list(FAULT_FRACS.values())
        behaviour[: len(clean)] = generator.choice(["ok", *names], len(clean), p=[1 - sum(shares), *shares])
    order = generator.permutation(number)
    if config.attacks.late:
        order = np.concatenate([order[order < len(clean)], order[order >= len(clean)]])
    images = pa.chunked_array([*clean["image"].chunks, *poisons["image"].chunks]).take(order)
    captions = pa.chunked_array([*clean["caption"].chunks, *poisons["caption"].chunks]).take(order)
    paths = [f"/{row:08d}.{_suffix(image.as_py())}" for row, image in enumerate(images)]
    write_parquet(
        folder / "corpus.parquet",
        pa.table({"path": paths, "image": images, "caption": captions, "behaviour": behaviour[order].tolist()}),
    )
    rows = np.argsort(order)[len(clean) :]
    keys = [sample_key(int(row), config.ingest.samples_per_shard) for row in rows]
    truth = poisons.drop(["image", "label"]).append_column("key", pa.array(keys, pa.string()))
    write_truth(folder / TRUTH, truth.to_pylist())


def _letterboxed(table: pa.Table, size: int) -> pa.Table:
    """Return the table with every image letterboxed to `size` pixels."""
    images = [letterbox(image, size) for image in table["image"].to_pylist()]
    return table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))


def _suffix(encoded: bytes) -> str:
    return "png" if encoded[:4] == b"\x89PNG" else "jpg"
