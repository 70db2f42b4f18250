"""Judges a finished checkpoint, in process or by Ray. The only code that moves TRUSTED, and only for a verdict of clean."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.oracle.case import Case, case_of
from cluster.oracle.scan import cpus_per_actor, scan_with_actors
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.data.shards import Manifest, digest
from roclip.errors import DataError, StageError
from roclip.metrics.registry import Progress
from roclip.model.safe_load import read_weights
from roclip.model.towers import Encoder, weights_file
from roclip.oracle.check import check
from roclip.oracle.report import SCHEMA
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import scan_side_px
from roclip.oracle.scan.scorer import Scorer, scorer_fingerprint
from roclip.oracle.segmenters.base import Segmenter, calibrate_on
from roclip.oracle.segmenters.opening import open_segmenter
from roclip.oracle.segmenters.trained import train_segmenter
from roclip.storage import sha256_file, write_atomic


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
    same oracle on the same shards, is not judged again. Ray must be initialised by the caller, unless `in_process`; then
    `oracle.actors` look at the shards between two Ray tasks, one that trains the segmenter and one that judges. What was
    done is not done again when the same command follows one that was cut off.

    Raises `CheckpointError` without a checkpoint, `DataError` without trusted images to train an oracle on, `StageError` if
    a task is lost.
    """
    named = {"checkpoint": checkpoint, "data": data, "truth": truth, "out": out}
    if in_process:
        return judge(config, run, arm, on_progress=_teller(run, arm), **named)
    nodes = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    cpus = min(config.cluster.workers * config.cluster.cpus_per_worker, max(nodes))  # training is over: take its share
    what = (dump_config(config), run.resolve(), arm, str(Path.cwd()), named)
    gpus = min(config.oracle.gpus_per_actor, 1.0)
    to_scan = _get(_prepare.options(num_cpus=cpus, num_gpus=gpus, name=f"oracle {arm} prepares").remote(*what), arm)
    if to_scan is not None:
        shards, saved = to_scan
        mine = float(os.cpu_count() or 1) if config.cluster.address == "local" else max(nodes)
        scan_with_actors(
            partial(_scorer, *what),
            shards,
            saved,
            name=f"oracle {arm.replace('/', ' ')} looks",  # Ray Data makes a file's name of it
            actors=config.oracle.actors,
            cpus=cpus_per_actor([min(node, mine) for node in nodes], config.oracle.actors),
            gpus=config.oracle.gpus_per_actor,
            progress=_teller(run, arm),
        )
    return _get(_judge.options(num_cpus=cpus, num_gpus=gpus, name=f"oracle {arm} judges").remote(*what), arm)


def judge(
    config: Config,
    run: Path,
    arm: str,
    checkpoint: str | Path | None = None,
    on_progress: Progress | None = None,
    **named: Any,
) -> dict[str, Any]:
    """`oracle` in this process, without Ray."""
    brief = brief_of(config, run, arm, on_progress, checkpoint=checkpoint, **named)
    case = brief.case
    report = _earlier(case.out / "report.json", brief.subject)
    if report is None:
        report = check(
            Encoder.load(case.checkpoint),
            brief.segmenter,
            shards=case.shards,
            trusted=case.trusted,
            labels=case.labels,
            templates=case.templates,
            config=config.oracle,
            repair=config.repair,
            out=case.out,
            caption_key=case.caption_key,
            truth=case.truth,
            subject=brief.subject,
            saved=brief.saved,
            seed=config.seed,
            on_progress=on_progress,
        )
    if case.own:
        _trust(run / arm / "checkpoints", case.checkpoint.name, report["verdict"])
    kept = ("verdict", "target_labels", "victim_precision", "victim_recall")
    return {"checkpoint": case.checkpoint.name, **{key: report[key] for key in kept if key in report}}


@dataclass(frozen=True)
class Brief:
    """What is judged, and by whom."""

    case: Case
    segmenter: Segmenter
    subject: dict[str, Any]

    @property
    def saved(self) -> SavedScans:
        case = self.case
        scorer = scorer_fingerprint(self.subject["weights_sha256"], self.segmenter, case.labels, case.templates)
        return SavedScans(case.out / "pass", scorer, case.caption_key, scan_side_px(case.shards, case.caption_key))


def brief_of(config: Config, run: Path, arm: str, on_progress: Progress | None, **named: Any) -> Brief:
    """Checks what must be there, and trains the segmenter if there is none yet."""
    case = case_of(config, run, arm, on_progress=on_progress, **named)
    read_weights(weights_file(case.checkpoint))  # refused before an oracle is trained for it
    segmenter = _segmenter(config, run, case, on_progress)
    subject = {
        "checkpoint": case.checkpoint.name,
        "weights_sha256": sha256_file(weights_file(case.checkpoint)),
        "shards_digest": digest(Manifest(case.shards).records()),
        "oracle_sha256": segmenter.info["sha256"],
        "trusted_sha256": sha256_file(case.trusted) if case.trusted else None,
        "labels": case.labels,
        "templates": case.templates,
        "config": dataclasses.asdict(config.oracle.of_verdict),
        "set": {"set_frac": config.repair.set_frac, "stamped_frac": config.repair.stamped_frac},
    }
    # As the report will have it: tuples are lists there.
    return Brief(case, segmenter, json.loads(json.dumps(subject)))


# ---- what runs on other processes ---------------------------------------------------------------------------


@ray.remote(max_retries=1)
def _prepare(config: str, run: Path, arm: str, where: str, named: dict[str, Any]) -> tuple[Path, SavedScans] | None:
    """The shards, and where their looks go; None where the same check was made before."""
    brief = brief_of(_settled(config, where), run, arm, _teller(run, arm), **named)
    if _earlier(brief.case.out / "report.json", brief.subject) is not None:
        return None
    return brief.case.shards, brief.saved


@ray.remote(max_retries=1)
def _judge(config: str, run: Path, arm: str, where: str, named: dict[str, Any]) -> dict[str, Any]:
    return judge(_settled(config, where), run, arm, on_progress=_teller(run, arm), **named)


def _scorer(config: str, run: Path, arm: str, where: str, named: dict[str, Any]) -> Scorer:
    settings = _settled(config, where)
    brief = brief_of(settings, run, arm, None, **named)
    encoder = Encoder.load(brief.case.checkpoint)
    return Scorer(encoder, brief.segmenter, brief.case.labels, brief.case.templates, settings.oracle.label_map)


def _settled(config: str, where: str) -> Config:
    """A process of Ray's as the caller's: its folder, so that relative paths mean the same, and its settings."""
    environment_defaults()
    with contextlib.suppress(OSError):  # another machine may not have it
        os.chdir(where)
    return parse_config(config)


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
