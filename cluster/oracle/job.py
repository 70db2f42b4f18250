"""Judges a finished checkpoint, in this process or on Ray, and moves TRUSTED when the verdict is clean.

`repair.py` is the only other code that moves TRUSTED.
"""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster.oracle.case import Case, case_of
from cluster.oracle.request import NEWEST, OracleRequest
from cluster.oracle.scan import cpus_per_actor, scan_with_actors
from roclip.config import Config, dump_config, environment_defaults, parse_config
from roclip.data.shards import Manifest, digest
from roclip.errors import DataError, StageError
from roclip.metrics.registry import Progress
from roclip.model.safe_load import read_weights
from roclip.model.towers import Encoder, weights_file
from roclip.oracle.check import CheckData, check
from roclip.oracle.report import SCHEMA
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import scan_side_px
from roclip.oracle.scan.scorer import Scorer, scorer_fingerprint
from roclip.oracle.segmenters.base import Segmenter, calibrate_on
from roclip.oracle.segmenters.opening import open_segmenter
from roclip.oracle.segmenters.trained import train_segmenter
from roclip.storage import sha256_file, write_atomic


def oracle(config: Config, run: Path, arm: str, request: OracleRequest = NEWEST) -> dict[str, Any]:
    """Judge a checkpoint, and return what `summary.json` keeps of the verdict.

    The report is written to `<run>/<arm>/oracle/`, or where the request says. An arm's newest checkpoint becomes TRUSTED when
    it is called clean; any other request leaves TRUSTED alone. A checkpoint that was judged before, by the same segmenter on
    the same shards, is not judged again. Unless `in_process`, the caller has initialised Ray: `oracle.actors` scan the shards
    between two Ray tasks, of which one trains the segmenter and one judges. The same command continues one that was cut off.

    Raises `CheckpointError` without a checkpoint, `DataError` without trusted images to train a segmenter on, `StageError` if
    a task is lost.
    """
    if request.in_process:
        return judge(config, run, arm, request, on_progress=_progress_writer(run, arm))
    nodes = [node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]]
    cpus = min(config.cluster.workers * config.cluster.cpus_per_worker, max(nodes))  # training is over: take its share
    job = _Job(dump_config(config), run.resolve(), arm, str(Path.cwd()), request)
    gpus = min(config.oracle.gpus_per_actor, 1.0)
    to_scan = _get(_prepare.options(num_cpus=cpus, num_gpus=gpus, name=f"oracle {arm} prepares").remote(job), arm)
    if to_scan is not None:
        shards, saved = to_scan
        local = float(os.cpu_count() or 1) if config.cluster.address == "local" else max(nodes)
        scan_with_actors(
            job.scorer,
            shards,
            saved,
            name=f"oracle {arm.replace('/', ' ')} looks",  # Ray Data makes a file's name of it
            actors=config.oracle.actors,
            cpus=cpus_per_actor([min(node, local) for node in nodes], config.oracle.actors),
            gpus=config.oracle.gpus_per_actor,
            progress=_progress_writer(run, arm),
        )
    return _get(_judge.options(num_cpus=cpus, num_gpus=gpus, name=f"oracle {arm} judges").remote(job), arm)


def judge(
    config: Config, run: Path, arm: str, request: OracleRequest = NEWEST, on_progress: Progress | None = None
) -> dict[str, Any]:
    """`oracle` in this process, without Ray."""
    brief = brief_of(config, run, arm, request, on_progress)
    case = brief.case
    report = _earlier(case.out / "report.json", brief.subject)
    if report is None:
        report = check(
            Encoder.load(case.checkpoint),
            brief.segmenter,
            case.data,
            config.oracle,
            config.repair,
            case.out,
            seed=config.seed,
            subject=brief.subject,
            saved=brief.saved,
            on_progress=on_progress,
        )
    return _conclude(case, run / arm / "checkpoints", report)


def judged(config: Config, run: Path, arm: str, request: OracleRequest = NEWEST) -> dict[str, Any] | None:
    """What `oracle` returned for the same check before, or None if it was not made. Needs no Ray."""
    if not (case_of(config, run, arm, request).out / "report.json").exists():
        return None  # and perhaps no segmenter either, which `brief_of` would train here
    brief = brief_of(config, run, arm, request)
    report = _earlier(brief.case.out / "report.json", brief.subject)
    return None if report is None else _conclude(brief.case, run / arm / "checkpoints", report)


def _conclude(case: Case, checkpoints: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Move TRUSTED if the verdict is of the newest checkpoint, and return what `summary.json` keeps of it."""
    if case.of_newest:
        point_trusted(checkpoints, case.checkpoint.name, report["verdict"] == "clean")
    kept = ("verdict", "target_labels", "victim_precision", "victim_recall")
    return {"checkpoint": case.checkpoint.name, **{key: report[key] for key in kept if key in report}}


@dataclass(frozen=True)
class Brief:
    """A case with its segmenter, and the identity of both."""

    case: Case
    segmenter: Segmenter
    subject: dict[str, Any]
    """All that a verdict depends on, as the report has it: two checks with equal subjects give the same report."""

    @property
    def saved(self) -> SavedScans:
        """The saved scans of this case's shards."""
        data = self.case.data
        scorer = scorer_fingerprint(self.subject["weights_sha256"], self.segmenter, data.labels, data.templates)
        return SavedScans(self.case.out / "pass", scorer, data.caption_key, scan_side_px(data.shards, data.caption_key))


def brief_of(
    config: Config, run: Path, arm: str, request: OracleRequest = NEWEST, on_progress: Progress | None = None
) -> Brief:
    """Resolve a request, check the weights, and open the segmenter, which is trained first where there is none yet."""
    case = case_of(config, run, arm, request, on_progress)
    read_weights(weights_file(case.checkpoint))  # refused before a segmenter is trained for it
    segmenter = _segmenter(config, run, case.data, on_progress)
    subject = {
        "checkpoint": case.checkpoint.name,
        "weights_sha256": sha256_file(weights_file(case.checkpoint)),
        "shards_digest": digest(Manifest(case.data.shards).records()),
        "oracle_sha256": segmenter.info["sha256"],
        "trusted_sha256": sha256_file(case.data.trusted) if case.data.trusted else None,
        "labels": case.data.labels,
        "templates": case.data.templates,
        "config": dataclasses.asdict(config.oracle.of_verdict),
        "set": {"set_frac": config.repair.set_frac, "stamped_frac": config.repair.stamped_frac},
    }
    return Brief(case, segmenter, json.loads(json.dumps(subject)))  # tuples are lists in the report


# ---- in Ray's processes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """`oracle`'s arguments for another process."""

    config: str
    run: Path
    arm: str
    where: str
    """The caller's working directory, so that relative paths mean the same."""
    request: OracleRequest

    def settle(self) -> Config:
        """Take over the caller's environment and working directory; returns the config."""
        environment_defaults()
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(self.where)
        return parse_config(self.config)

    def scorer(self) -> Scorer:
        """The scorer of an actor, made in the actor."""
        config = self.settle()
        brief = brief_of(config, self.run, self.arm, self.request)
        data = brief.case.data
        encoder = Encoder.load(brief.case.checkpoint)
        return Scorer(encoder, brief.segmenter, data.labels, data.templates, config.oracle.label_map)


@ray.remote(max_retries=1)
def _prepare(job: _Job) -> tuple[Path, SavedScans] | None:
    """The shards to scan and where their scans are saved; None where the same check was made before."""
    on_progress = _progress_writer(job.run, job.arm)
    brief = brief_of(job.settle(), job.run, job.arm, job.request, on_progress)
    if _earlier(brief.case.out / "report.json", brief.subject) is not None:
        return None
    return brief.case.data.shards, brief.saved


@ray.remote(max_retries=1)
def _judge(job: _Job) -> dict[str, Any]:
    return judge(job.settle(), job.run, job.arm, job.request, _progress_writer(job.run, job.arm))


def _get(task: Any, arm: str) -> Any:
    """The result of a task. Raises what the task raised, or `StageError` if it was lost."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from error
    except ray.exceptions.RayError as error:
        raise StageError(f"oracle on {arm}: its task was lost ({error}). Run the same command again.") from error


def _progress_writer(run: Path, arm: str) -> Progress:
    path = progress_file(run, arm)
    return lambda done, total, text: write_atomic(path, json.dumps([done, total, text]))


def progress_file(run: Path, arm: str) -> Path:
    """The file in which a task reports its progress: [done, total, text] as JSON."""
    return run / arm / "oracle" / "progress.json"


def point_trusted(checkpoints: Path, name: str, trusted: bool) -> None:
    """Point TRUSTED at a checkpoint that is trusted; remove TRUSTED where it points at one that is not trusted any more."""
    pointer = checkpoints / "TRUSTED"
    if trusted:
        write_atomic(pointer, name)
    elif pointer.exists() and pointer.read_text().strip() == name:
        pointer.unlink()


def read_result(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where the file is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _segmenter(config: Config, run: Path, data: CheckData, on_progress: Progress | None) -> Segmenter:
    """The segmenter of `oracle.weights`, calibrated where there are trusted images; otherwise the run's own, which is trained
    once for these trusted images and settings."""
    settings = config.oracle
    if settings.weights:
        segmenter = open_segmenter(settings.weights, data.labels, settings.label_map)
        if data.trusted and not segmenter.info["calibrated"]:
            calibrate_on(segmenter, data.trusted, settings.reference_frac, config.seed)
        return segmenter
    if data.trusted is None:
        raise DataError(
            f"{run / 'origin' / 'trusted.parquet'}: expected trusted images with masks, which the oracle learns from, got "
            "none. Run `roclip ingest` first, set oracle.trusted_file, or name an oracle in oracle.weights."
        )
    return train_segmenter(data.trusted, data.labels, settings, config.seed, run / "segmenter", on_progress)


def _earlier(path: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier check with the same subject, or None."""
    report = read_result(path)
    return report if report.get("schema") == SCHEMA and report.get("subject") == subject else None
