"""Judges a finished checkpoint as a Ray task. The only code that moves TRUSTED, and only for a verdict of clean."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.oracle_case import Case, case_of
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.errors import DataError, StageError
from roclip.metrics import Progress
from roclip.model import Encoder, weights_file
from roclip.oracle.check import SCHEMA, check
from roclip.oracle.opening import open_segmenter
from roclip.oracle.segmenters import Segmenter, calibrate_on
from roclip.oracle.trained import train_segmenter
from roclip.shards import Manifest, digest, sha256_file, write_atomic


def oracle(
    config: Config,
    run: Path,
    arm: str,
    *,
    checkpoint: str | Path | None = None,
    data: str = "",
    truth: Path | None = None,
    out: Path | None = None,
    in_process: bool = False,
) -> dict[str, Any]:
    """Judge the checkpoint that `<run>/<arm>/checkpoints/LATEST` names; returns what summary.json keeps of the verdict.

    The report lies in `<run>/<arm>/oracle/`. A checkpoint of the arm that is called clean becomes TRUSTED. What else can be
    judged, on which data: `oracle_case.case_of`; TRUSTED then stays as it is. A checkpoint that was judged before, by the
    same oracle on the same shards, is not judged again. Runs as one Ray task; Ray must be initialised by the caller, unless
    `in_process`.

    Raises `CheckpointError` without a checkpoint, `DataError` without trusted images to train an oracle on, `StageError` if
    the task is lost.
    """
    named = {"checkpoint": checkpoint, "data": data, "truth": truth, "out": out}
    if in_process:
        return judge(config, run, arm, on_progress=_told(run, arm), **named)
    largest = max(node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"])
    cpus = min(config.cluster.workers * config.cluster.cpus_per_worker, largest)  # training is over: take its share
    task = _judge.options(num_cpus=cpus, max_retries=1)
    try:
        return ray.get(task.remote(dump_config(config), str(run.resolve()), arm, str(Path.cwd()), named))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except ray.exceptions.RayError as error:
        raise StageError(f"oracle on {arm}: its task was lost ({error}). Run the same command again.") from error


def judge(
    config: Config,
    run: Path,
    arm: str,
    checkpoint: str | Path | None = None,
    on_progress: Progress | None = None,
    **named: Any,
) -> dict[str, Any]:
    """`oracle` in this process, without Ray."""
    case = case_of(config, run, arm, checkpoint=checkpoint, on_progress=on_progress, **named)
    encoder = Encoder.load(case.checkpoint)
    segmenter = _segmenter(config, run, case, on_progress)
    subject = {
        "checkpoint": case.checkpoint.name,
        "weights_sha256": sha256_file(weights_file(case.checkpoint)),
        "shards_digest": digest(Manifest(case.shards).records()),
        "oracle_sha256": segmenter.info["sha256"],
        "trusted_sha256": sha256_file(case.trusted) if case.trusted else None,
        "labels": case.labels,
        "templates": case.templates,
        "config": dataclasses.asdict(dataclasses.replace(config.oracle, fail_on="never")),
    }
    subject = json.loads(json.dumps(subject))  # as the report will have it: tuples are lists there
    report = _earlier(case.out / "report.json", subject)
    if report is None:
        report = check(
            encoder,
            segmenter,
            shards=case.shards,
            trusted=case.trusted,
            labels=case.labels,
            templates=case.templates,
            config=config.oracle,
            out=case.out,
            caption_key=case.caption_key,
            truth=case.truth,
            subject=subject,
            on_progress=on_progress,
        )
    if case.own:
        _trust(run / arm / "checkpoints", case.checkpoint.name, report["verdict"])
    kept = ("verdict", "target_labels", "victim_precision", "victim_recall")
    return {"checkpoint": case.checkpoint.name, **{key: report[key] for key in kept if key in report}}


@ray.remote
def _judge(config: str, run: str, arm: str, where: str, named: dict[str, Any]) -> dict[str, Any]:
    environment_defaults()
    with contextlib.suppress(OSError):  # another machine may not have it
        os.chdir(where)  # relative paths are the caller's
    run_path = Path(run)
    return judge(parse_config(config), run_path, arm, on_progress=_told(run_path, arm), **named)


def _told(run: Path, arm: str) -> Progress:
    """What a judge says, into `progress_file`."""

    def say(done: float, total: float, text: str) -> None:
        write_atomic(progress_file(run, arm), json.dumps([done, total, text]))

    return say


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


def _segmenter(config: Config, run: Path, case: Case, on_progress: Progress | None) -> Segmenter:
    """The oracle that is named, calibrated where trusted images are there; or the run's own, which is trained once for
    these trusted images and settings."""
    settings = config.oracle
    if settings.weights:
        segmenter = open_segmenter(settings.weights, case.labels, settings.label_map)
        if case.trusted and not segmenter.info["calibrated"]:
            calibrate_on(segmenter, case.trusted, settings.reference_frac, config.seed)
        return segmenter
    if case.trusted is None:
        raise DataError(
            f"{run / 'origin' / 'trusted.parquet'}: expected trusted images with masks, which the oracle learns from, got "
            "none. Run `roclip ingest` first, set oracle.trusted_file, or name an oracle in oracle.weights."
        )
    return train_segmenter(case.trusted, case.labels, settings, config.seed, run / "segmenter", on_progress)


def _earlier(path: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the same check, or None."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return report if report.get("schema") == SCHEMA and report.get("subject") == subject else None
