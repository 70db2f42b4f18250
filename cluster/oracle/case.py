"""Resolves what an oracle judges: the checkpoint, its data as shards, the labels; of a run, or of anybody.

OUT/data-<digest>/   data that is not in shards, once: 00000.tar … with <key>.jpg and <key>.txt, 00000.parquet with
                     each key's source, shards/ with their indexes and manifest
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.oracle.request import NEWEST, OracleRequest, is_step, step_folder
from cluster.shard_copy import suffix_of
from ingest.shard.tar_writer import SortedTar
from roclip.checkpoint import pointers
from roclip.config import Config
from roclip.data.ground_truth import write_parquet
from roclip.data.shards import Manifest, sample_key
from roclip.data.tar_index import IMAGE_SUFFIXES
from roclip.data.tar_sources import index_tars, is_pattern, shards_root
from roclip.errors import CheckpointError, ConfigError, DataError
from roclip.metrics.registry import Progress
from roclip.oracle.check import CheckData
from roclip.oracle.segmenters.mask_sets import read_labels

PER_TAR = 4096
"""Samples in each tar made from a parquet or a folder."""
Sample = tuple[str, bytes, str]
"""Source, encoded image, caption."""


@dataclass(frozen=True)
class Case:
    """All that a check needs beside its settings."""

    checkpoint: Path
    of_newest: bool
    """Whether it is the arm's newest checkpoint on its own data, so that a verdict moves TRUSTED."""
    data: CheckData
    out: Path
    """Folder of the report."""


def case_of(
    config: Config, run: Path, arm: str, request: OracleRequest = NEWEST, on_progress: Progress | None = None
) -> Case:
    """Resolve a request: find the checkpoint, bring its data into shards, read labels and templates.

    Raises `CheckpointError`, `DataError` or `ConfigError` that says what is missing.
    """
    folder = run / arm / "checkpoints"
    named = request.checkpoint
    path = _checkpoint(run, arm, named) if named else pointers.named(folder, "LATEST")
    if path is None:
        raise CheckpointError(f"{folder}: expected a checkpoint, got none. Run `roclip train` first, or name one.")
    if not named or (path / pointers.SUMS).exists():
        pointers.verify(path)
    suffix = "-data" if request.data else f"-{path.name}" if path.parent == folder and named else ""
    origin, out = run / "origin", request.out or run / arm / f"oracle{suffix}"
    shards, caption_key = shards_root(config.data.shards, run), config.data.caption_key
    if request.data:
        shards, caption_key = _shards_of(request.data, config, out, on_progress)
    elif is_pattern(config.data.shards) and Manifest(shards).summary is None:
        index_tars(config.data.shards, shards, on_progress=on_progress)
    labels, templates = _labels(config, origin)
    trusted = Path(config.oracle.trusted_file) if config.oracle.trusted_file else origin / "trusted.parquet"
    if config.oracle.trusted_file and not trusted.is_file():
        raise DataError(f"{trusted}: expected trusted images with masks (oracle.trusted_file), got no file.")
    truth = request.truth
    if truth is not None and not truth.is_file():
        raise DataError(f"{truth}: expected the keys of the poisoned samples (--truth), got no file.")
    data = CheckData(
        shards=shards,
        labels=labels,
        templates=templates,
        trusted=trusted if trusted.is_file() else None,
        caption_key=caption_key,
        truth=truth or (None if request.data else origin / "poison.parquet"),
    )
    return Case(path, request.of_newest, data, out)


def _checkpoint(run: Path, arm: str, name: str) -> Path:
    folder = run / arm / "checkpoints"
    if is_step(run / arm, name):
        return step_folder(folder, name)
    if not Path(name).is_dir():
        known = ", ".join(sorted(found.name for found in folder.glob("step-*"))) or "none"
        raise CheckpointError(
            f"{name}: expected a folder with weights of open_clip, or one of the steps in {folder} ({known}), got neither."
        )
    return Path(name)


def _labels(config: Config, origin: Path) -> tuple[list[str], list[str]]:
    """Labels and templates: those that ingest recorded, else those of the config."""
    noted = origin / "labels.json"
    if noted.exists():
        try:
            names: dict[str, Any] = json.loads(noted.read_text())
            return names["labels"], names["templates"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{noted}: expected the run's labels and templates, got {error!r}. Run `roclip ingest` first."
            ) from error
    oracle = config.oracle
    labels = read_labels(Path(oracle.label_file)) if oracle.label_file else list(oracle.labels)
    if not labels:
        raise ConfigError(
            f"oracle.labels: expected the labels to ask about, got none, and {noted} is not there. Set oracle.labels=[cat,dog] "
            "or oracle.label_file=FILE (a JSON list, or a text with one a line), or run `roclip ingest` first."
        )
    return labels, [template.replace("{c}", "{}") for template in config.evaluate.templates]


def _shards_of(data: str, config: Config, out: Path, on_progress: Progress | None) -> tuple[Path, str]:
    """Folder with a manifest of this data, and the json key of its captions."""
    path = Path(data)
    if path.is_file() and path.suffix != ".tar":
        samples, state = _parquet_samples(path, config), _state([path])
    elif is_pattern(data):
        work = out / f"data-{_digest(data)}"
        index_tars(data, work, on_progress=on_progress)
        return work, config.data.caption_key
    elif path.is_dir() and (path / "manifest").is_dir():
        return path, config.data.caption_key
    elif path.is_dir():
        samples, state = _folder_samples(path), _state(path.rglob("*"))
    else:
        raise DataError(
            f"{data}: expected shards, tars, a parquet or a folder of images (--data), got nothing there. Check the path."
        )
    work = out / f"data-{_digest(data, *state)}"
    if Manifest(work / "shards").summary is None:
        _write_tars(samples, work, config.ingest.samples_per_shard, on_progress)
        index_tars(str(work), work / "shards", on_progress=on_progress)
    return work / "shards", ""


def _write_tars(samples: Iterator[Sample], work: Path, samples_per_shard: int, on_progress: Progress | None) -> None:
    """Write samples to tars, each renamed to its final name when it is complete; leftovers of a kill are written again."""
    work.mkdir(parents=True, exist_ok=True)
    for left in [*work.glob("*.tar"), *work.glob(".spool"), *work.glob("*.partial")]:
        left.unlink()
    row = 0
    for number, first in enumerate(samples):
        tar, noted = SortedTar(work / ".spool"), []
        for source, image, caption in chain([first], islice(samples, PER_TAR - 1)):
            key = sample_key(row, samples_per_shard)
            tar.add(key, {suffix_of(image): image, "txt": caption.encode()})
            noted.append({"key": key, "source": source})
            row += 1
        write_parquet(work / f"{number:05d}.parquet", pa.Table.from_pylist(noted))
        whole = work / f"{number:05d}.tar"
        tar.write(whole.with_suffix(".partial"))
        whole.with_suffix(".partial").rename(whole)
        if on_progress:
            on_progress(row, row, f"{row:,} samples copied into tars")
    if not row:
        raise DataError(f"{work}: expected samples (--data), got none.")


def _parquet_samples(path: Path, config: Config) -> Iterator[Sample]:
    columns = [config.data.image_col, config.data.caption_col]
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a parquet of images and captions, got {error}.") from error
    if missing := [column for column in columns if column not in file.schema_arrow.names]:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}. Set data.image_col and "
            "data.caption_col."
        )

    def rows() -> Iterator[Sample]:
        number = 0
        with contextlib.closing(file):
            for batch in file.iter_batches(256, columns=columns):
                for image, caption in zip(*(batch[column].to_pylist() for column in columns), strict=True):
                    image = image.get("bytes") if isinstance(image, dict) else image  # as `datasets` writes them
                    yield f"row {number}", image or b"", _text(caption)
                    number += 1

    return rows()


def _folder_samples(folder: Path) -> Iterator[Sample]:
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not any(path.with_suffix(".txt").is_file() for path in images):
        raise DataError(
            f"{folder}: expected shards, tars, or images with a caption in a txt of the same name, got {len(images)} images "
            "and no such caption."
        )
    for path in images:
        beside = path.with_suffix(".txt")
        caption = beside.read_bytes().decode(errors="replace") if beside.is_file() else ""
        yield str(path.relative_to(folder)), path.read_bytes(), _text(caption)


def _text(caption: Any) -> str:
    return " ".join(str(caption or "").encode(errors="replace").decode().split())


def _state(paths: Any) -> list[str]:
    """Path, size and modification time of each file, which change when its content does."""
    stats = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
