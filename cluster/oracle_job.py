"""Judges a finished checkpoint, in process or by Ray. The only code that moves TRUSTED, and only for a verdict of clean."""

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.oracle_pass import cpus_per_actor, look_with_actors
from roclip import checkpoint as checkpoints
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.errors import CheckpointError, DataError, StageError
from roclip.metrics import Progress
from roclip.model import WEIGHTS, Encoder, Towers
from roclip.oracle.check import check
from roclip.oracle.report import SCHEMA
from roclip.oracle.segmenters import CARD, TrainedSegmenter, train_segmenter
from roclip.oracle.shardlook import SavedLooks
from roclip.oracle.shardpass import side_of
from roclip.oracle.witness import Witness, made_by
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
    was judged before, by the same oracle on the same shards, is not judged again. Ray must be initialised by the caller,
    unless `in_process`; then `oracle.actors` look at the shards between two Ray tasks, one that trains the segmenter
    and one that judges. What was done is not done again when the same command follows one that was cut off.

    Raises `CheckpointError` without a checkpoint, `DataError` without trusted images, `StageError` if a task is lost.
    """
    if in_process:
        return judge(config, run, arm, checkpoint)
    run, checkpoint = run.resolve(), None if checkpoint is None else checkpoint.resolve()
    nodes = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    cpus = min(config.cluster.workers * config.cluster.cpus_per_worker, max(nodes))  # training is over: take its share
    what = (dump_config(config), run, arm, checkpoint)
    saved = _get(_prepare.options(num_cpus=cpus, name=f"oracle:{arm}:prepare").remote(*what), arm)
    if saved is not None:
        mine = float(os.cpu_count() or 1) if config.cluster.address == "local" else max(nodes)
        look_with_actors(
            partial(_witness, *what),
            shards_root(config.data.shards, run),
            saved,
            name=f"oracle:{arm}:look",
            actors=config.oracle.actors,
            cpus=cpus_per_actor([min(node, mine) for node in nodes], config.oracle.actors),
            gpus=config.oracle.gpus_per_actor,
            say=_teller(run, arm),
        )
    return _get(_judge.options(num_cpus=cpus, name=f"oracle:{arm}:judge").remote(*what), arm)


def judge(
    config: Config,
    run: Path,
    arm: str,
    checkpoint: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """`oracle` in this process, without Ray."""
    case = _case(config, run, arm, checkpoint, on_progress)
    report = _earlier(case.out / "report.json", case.subject)
    if report is None:
        report = check(
            Encoder.load(case.path),
            case.segmenter,
            shards=case.shards,
            trusted=case.trusted,
            labels=case.labels,
            templates=case.templates,
            config=config.oracle,
            out=case.out,
            caption_key=config.data.caption_key,
            truth=run / "origin" / "poison.parquet",
            subject=case.subject,
            saved=case.saved(config.data.caption_key),
            on_progress=on_progress,
        )
    if checkpoint is None:
        _trust(run / arm / "checkpoints", case.path.name, report["verdict"])
    kept = ("verdict", "target_labels", "victim_precision", "victim_recall")
    return {"checkpoint": case.path.name, **{key: report[key] for key in kept if key in report}}


@dataclass(frozen=True)
class _Case:
    """What is judged, and by whom."""

    path: Path
    """Of the checkpoint."""
    segmenter: TrainedSegmenter
    labels: list[str]
    templates: list[str]
    shards: Path
    trusted: Path
    out: Path
    subject: dict[str, Any]

    def saved(self, caption_key: str) -> SavedLooks:
        witness = made_by(self.subject["weights_sha256"], self.segmenter, self.labels, self.templates)
        return SavedLooks(self.out / "pass", witness, caption_key, side_of(self.shards, caption_key))


def _case(config: Config, run: Path, arm: str, checkpoint: Path | None, on_progress: Progress | None) -> _Case:
    """Checks what must be there, and trains the segmenter if there is none yet."""
    path = _checkpoint(run, arm, checkpoint)
    if (path / checkpoints.SUMS).exists() or checkpoint is None:
        checkpoints.verify(path)
    shards, names, trusted = shards_root(config.data.shards, run), _labels(run), run / "origin" / "trusted.parquet"
    if not trusted.exists():
        raise DataError(f"{trusted}: expected trusted images with masks, got none. Run `roclip ingest` first.")
    segmenter = _segmenter(config, run, trusted, names["labels"], on_progress)
    subject = {
        "checkpoint": path.name,
        "weights_sha256": sha256_file(path / WEIGHTS),
        "shards_digest": digest(Manifest(shards).records()),
        "oracle_sha256": segmenter.info["sha256"],
        "trusted_sha256": sha256_file(trusted),
        "config": dataclasses.asdict(config.oracle.of_verdict),
    }
    return _Case(path, segmenter, names["labels"], names["templates"], shards, trusted, run / arm / "oracle", subject)


def _checkpoint(run: Path, arm: str, checkpoint: Path | None) -> Path:
    folder = run / arm / "checkpoints"
    path = checkpoint or checkpoints.named(folder, "LATEST")
    if path is None:
        raise CheckpointError(f"{folder}: expected a checkpoint, got none. Run `roclip train` first.")
    return path


# ---- what runs on other processes ---------------------------------------------------------------------------


@ray.remote(max_retries=1)
def _prepare(config: str, run: Path, arm: str, checkpoint: Path | None) -> SavedLooks | None:
    """All that the looks need; gives where they go, or None where the same check was made before."""
    environment_defaults()
    settings = parse_config(config)
    case = _case(settings, run, arm, checkpoint, _teller(run, arm))
    if _earlier(case.out / "report.json", case.subject) is not None:
        return None
    return case.saved(settings.data.caption_key)


@ray.remote(max_retries=1)
def _judge(config: str, run: Path, arm: str, checkpoint: Path | None) -> dict[str, Any]:
    environment_defaults()
    return judge(parse_config(config), run, arm, checkpoint, _teller(run, arm))


def _witness(config: str, run: Path, arm: str, checkpoint: Path | None) -> Witness:
    """An actor's, on its GPU if it has one."""
    environment_defaults()
    settings, names = parse_config(config), _labels(run)
    towers = Towers.load(_checkpoint(run, arm, checkpoint))
    segmenter = _segmenter(settings, run, run / "origin" / "trusted.parquet", names["labels"], None)
    device = "cuda" if settings.oracle.gpus_per_actor else "cpu"
    return Witness(Encoder(towers.to(device)), segmenter, names["labels"], names["templates"])


def _get(task: Any, arm: str) -> Any:
    """What a task gives. Raises what it raised, or `StageError`."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except ray.exceptions.RayError as error:
        raise StageError(f"oracle on {arm}: its task was lost ({error}). Run the same command again.") from error


def _teller(run: Path, arm: str) -> Progress:
    where = progress_file(run, arm)
    return lambda done, total, text: write_atomic(where, json.dumps([done, total, text]))


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


def _segmenter(
    config: Config, run: Path, trusted: Path, labels: list[str], on_progress: Progress | None
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


def _labels(run: Path) -> dict[str, list[str]]:
    path = run / "origin" / "labels.json"
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
