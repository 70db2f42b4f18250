"""Judges a finished checkpoint as a Ray task. The only code that moves TRUSTED, and only for a verdict of clean."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from roclip import checkpoint as checkpoints
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.errors import CheckpointError, DataError, StageError
from roclip.metrics import Progress
from roclip.model import WEIGHTS, Encoder
from roclip.oracle.check import SCHEMA, check
from roclip.oracle.segmenters import CARD, TrainedSegmenter, train_segmenter
from roclip.shards import Manifest, digest, sha256_file, write_atomic
from roclip.tar_sources import shards_root


def oracle(
    config: Config,
    run: Path,
    arm: str,
    *,
    checkpoint: Path | None = None,
    in_process: bool = False,
) -> dict[str, Any]:
    """Judge the checkpoint that `<run>/<arm>/checkpoints/LATEST` names; returns what summary.json keeps of the verdict.

    The report lies in `<run>/<arm>/oracle/`. A checkpoint of the arm that is called clean becomes TRUSTED. With
    `checkpoint`, any folder with open_clip weights is judged instead, and TRUSTED stays as it is. A checkpoint that
    was judged before, by the same oracle on the same shards, is not judged again. Runs as one Ray task; Ray must be
    initialised by the caller, unless `in_process`.

    Raises `CheckpointError` without a checkpoint, `DataError` without trusted images, `StageError` if the task is lost.
    """
    if in_process:
        return judge(config, run, arm, checkpoint)
    largest = max(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    cpus = min(config.cluster.workers * config.cluster.cpus_per_worker, largest)  # training is over: take its share
    task = _judge.options(num_cpus=cpus, max_retries=1)
    where = None if checkpoint is None else str(checkpoint.resolve())
    try:
        return ray.get(task.remote(dump_config(config), str(run.resolve()), arm, where))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except ray.exceptions.RayError as error:
        raise StageError(f"oracle on {arm}: its task was lost ({error}). Run the same command again.") from error


def judge(
    config: Config,
    run: Path,
    arm: str,
    checkpoint: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """`oracle` in this process, without Ray."""
    folder = run / arm / "checkpoints"
    path = checkpoint or checkpoints.named(folder, "LATEST")
    if path is None:
        raise CheckpointError(f"{folder}: expected a checkpoint, got none. Run `roclip train` first.")
    if (path / checkpoints.SUMS).exists() or checkpoint is None:
        checkpoints.verify(path)
    origin, out = run / "origin", run / arm / "oracle"
    shards = shards_root(config.data.shards, run)
    names = labels_of(origin / "labels.json")
    trusted = origin / "trusted.parquet"
    if not trusted.exists():
        raise DataError(f"{trusted}: expected trusted images with masks, got none. Run `roclip ingest` first.")
    segmenter = segmenter_of(config, run, trusted, names["labels"], on_progress)
    subject = {
        "checkpoint": path.name,
        "weights_sha256": sha256_file(path / WEIGHTS),
        "shards_digest": digest(Manifest(shards).records()),
        "oracle_sha256": segmenter.info["sha256"],
        "trusted_sha256": sha256_file(trusted),
        "config": dataclasses.asdict(config.oracle.of_the_verdict),
    }
    report = _earlier(out / "report.json", subject)
    if report is None:
        report = check(
            Encoder.load(path),
            segmenter,
            shards=shards,
            trusted=trusted,
            labels=names["labels"],
            templates=names["templates"],
            config=config.oracle,
            out=out,
            caption_key=config.data.caption_key,
            truth=origin / "poison.parquet",
            subject=subject,
            on_progress=on_progress,
        )
    if checkpoint is None:
        _trust(folder, path.name, report["verdict"])
    kept = ("verdict", "target_labels", "victim_precision", "victim_recall")
    return {"checkpoint": path.name, **{key: report[key] for key in kept if key in report}}


@ray.remote
def _judge(config: str, run: str, arm: str, checkpoint: str | None) -> dict[str, Any]:
    environment_defaults()
    where = progress_file(Path(run), arm)

    def say(done: int, total: int, text: str) -> None:
        write_atomic(where, json.dumps([done, total, text]))

    return judge(parse_config(config), Path(run), arm, None if checkpoint is None else Path(checkpoint), say)


def progress_file(run: Path, arm: str) -> Path:
    """Where the task says how far it is: [done, total, text] as JSON."""
    return run / arm / "oracle" / "progress.json"


def _trust(folder: Path, name: str, verdict: str) -> None:
    """Name a clean checkpoint in TRUSTED; take the name back from one that is no longer called clean."""
    pointer = folder / "TRUSTED"
    if verdict == "clean":
        write_atomic(pointer, name)
    elif pointer.exists() and pointer.read_text().strip() == name:
        pointer.unlink()


def segmenter_of(
    config: Config, run: Path, trusted: Path, labels: list[str], on_progress: Progress | None = None
) -> TrainedSegmenter:
    """The given segmenter, or the run's own, which is trained once for these trusted images and settings."""
    if config.oracle.weights:
        return TrainedSegmenter.load(Path(config.oracle.weights))
    folder = run / "segmenter"
    if (folder / CARD).exists():
        segmenter = TrainedSegmenter.load(folder)
        made_for = (segmenter.info["trusted_sha256"], segmenter.info["epochs"], segmenter.info["seed"])
        if segmenter.labels == tuple(labels) and made_for == (sha256_file(trusted), config.oracle.epochs, config.seed):
            return segmenter
    return train_segmenter(trusted, labels, config.oracle, config.seed, folder, on_progress)


def labels_of(path: Path) -> dict[str, list[str]]:
    """The run's `labels` and zero-shot `templates`. Raises `DataError`."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected the run's labels and templates, got {error}. Run `roclip ingest` first."
        ) from error


def _earlier(path: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the same check, or None."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report if report.get("schema") == SCHEMA and report.get("subject") == subject else None
