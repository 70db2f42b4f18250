"""The whole system in one file: URL list -> shards -> towers -> figures -> verdict -> report.

Each stage writes its result to the run directory and is skipped when the result exists, so the same command continues where
it stopped. Training starts as soon as the manifest has `data.min_shards` shards, while ingest still runs.
"""

import json
from pathlib import Path

from cluster.ingest.stage import fetching, index
from cluster.monitoring.publisher import count, following, labels_of
from cluster.oracle.request import NEWEST, OracleRequest, is_step
from cluster.ray.session import Session, session
from cluster.train.job import finished, train_arm
from roclip.checkpoint import pointers
from roclip.config import Config
from roclip.data.shards import Manifest
from roclip.errors import CheckpointError, ConfigError, DataError
from roclip.metrics.registry import read_metrics
from roclip.storage import write_atomic

REPAIRED = ("poisoned", "suspicious")
"""Verdicts after which `repair.enabled` repairs."""


def run(config: Config) -> dict:
    """Everything, from the URL list to the report. Returns the content of `summary.json`."""
    from roclip.report.run_report import write_report  # loads matplotlib

    with session(config) as here:
        with fetching(here) as crawl:
            crawl.wait_for(config.data.min_shards)
            for arm in config.arms:
                _train(here, arm)
        verdicts = {arm: _judge(here, arm) for arm in config.arms}
        here.note_cost()
        summary = {
            "schema": 1,
            "config": Path(config.source).name,
            "commit": here.provenance["commit"],
            **here.cost,
            "ingest": _counts(Manifest(here.shards)),
            "arms": {arm: {**_figures(here, arm), "oracle": verdicts[arm]} for arm in config.arms},
        }
        write_atomic(here.path / "summary.json", json.dumps(summary, indent=1))
        write_report(here.path)
        return summary


def _counts(manifest: Manifest) -> dict:
    """Ingest's counts; empty for shards without them, such as a poisoned copy of an ingest that had not ended."""
    summary = manifest.summary or {}
    return summary if "succeeded" in summary else {}


def train_only(config: Config) -> dict:
    """Train every arm on the shards of an earlier ingest. Raises `DataError` where there are none."""
    with session(config) as here:
        index(here)
        if not Manifest(here.shards).records():
            raise DataError(f"{here.shards}: expected sealed shards, got none. Run `roclip ingest` first.")
        for arm in config.arms:
            _train(here, arm)
        return {"arms": {arm: _figures(here, arm) for arm in config.arms}}


def evaluate_only(config: Config, folder: str | None = None) -> dict:
    """Measure the newest checkpoint of every arm, or the checkpoint in `folder`, afresh.

    The figures go into `<run>/<arm>/evaluation.json`, or `<run>/evaluation-<folder's name>.json`.
    """
    from roclip.evaluation.evaluate import evaluate, load_evaluation_set
    from roclip.model.towers import Encoder

    with session(config, resumes=False) as here:
        data = load_evaluation_set(config, here.path / "origin")
        if folder is not None:
            name = Path(folder).resolve().name
            figures = evaluate(Encoder.load(Path(folder)), data)
            path = here.path / f"evaluation-{name}.json"
            write_atomic(path, json.dumps({"checkpoint": folder, **figures}, indent=1))
            return {"arms": {name: figures}}
        arms = {}
        for arm in config.arms:
            latest = pointers.named(here.path / arm / "checkpoints", "LATEST")
            if latest is None:
                raise CheckpointError(f"{here.path / arm}: expected a checkpoint, got none. Run `roclip train` first.")
            pointers.verify(latest)
            arms[arm] = evaluate(Encoder.load(latest), data)
            result = {"checkpoint": latest.name, **arms[arm]}
            write_atomic(here.path / arm / "evaluation.json", json.dumps(result, indent=1))
        return {"arms": arms}


def oracle_only(config: Config, request: OracleRequest = NEWEST) -> dict:
    """Let the oracle judge the newest checkpoint of every arm, one step of every arm that has it, or that of a folder."""
    with session(config, resumes=False) as here:
        arms = list(config.arms)
        if request.checkpoint:
            having = [arm for arm in arms if is_step(here.path / arm, request.checkpoint)]
            arms = having or [Path(request.checkpoint).resolve().name]
        if request.out is not None and len(arms) > 1:
            raise ConfigError(
                f"--out: expected one training to report of, got {', '.join(arms)}. Set 'arms=[{arms[-1]}]'."
            )
        return {"arms": {arm: {"oracle": _judge(here, arm, request)} for arm in arms}}


# ---- the stages ---------------------------------------------------------------------------------------------


def _train(here: Session, arm: str) -> None:
    if finished(here.config, here.path / arm / "checkpoints"):
        return
    here.need_ray()
    with here.display.follow_training(arm, here.path / arm, here.config.train.epochs):
        train_arm(here.config, arm, here.path)


def _judge(here: Session, arm: str, request: OracleRequest = NEWEST) -> dict:
    """The oracle's verdict, and the result of the repair if the config asks for one and the verdict needs it."""
    from cluster.oracle.job import judged, oracle, progress_file  # loads torch

    settings = here.config.oracle
    if not (settings.weights or settings.trusted_file or (here.path / "origin" / "trusted.parquet").exists()):
        here.display.say(
            f"oracle   {arm} is not checked: {here.path / 'origin' / 'trusted.parquet'} (image, mask, label), which the "
            "oracle learns from, is not there. TRUSTED does not move"
        )
        return {"verdict": "inconclusive"}
    here.display.say(f"oracle   checking {arm}")
    result = judged(here.config, here.path, arm, request)
    if result is None:
        if not request.in_process:
            here.need_ray()
        said = progress_file(here.path, arm)
        said.unlink(missing_ok=True)
        with following(here.config, here.path / arm, "oracle"), here.display.follow_task("oracle", said):
            result = oracle(here.config, here.path, arm, request)
        count("roclip_oracle_verdicts", **labels_of(here.path / arm), verdict=result["verdict"])
    if here.config.repair.enabled and result["verdict"] in REPAIRED:
        result["repair"] = _repair(here, arm, request)
    return result


def _repair(here: Session, arm: str, request: OracleRequest) -> dict:
    from cluster.oracle.job import progress_file
    from cluster.oracle.repair import repair

    here.display.say(f"repair   {arm}")
    said = progress_file(here.path, f"{arm}/repair")
    said.unlink(missing_ok=True)

    def train(config: Config, name: str, folder: Path) -> Path:
        here.need_ray()  # which a check in this process did without
        with here.display.follow_training("repair", folder / name, config.train.epochs):
            return train_arm(config, name, folder)

    def say(text: str) -> None:
        here.display.say(f"repair   {text}")

    with here.display.follow_task("recheck", said):
        result = repair(here.config, here.path, arm, request, train=train, say=say)
    say("nothing is left: TRUSTED" if result["accepted"] else f"not trusted. {' '.join(result['reasons'])}")
    return {key: value for key, value in result.items() if key not in ("schema", "subject", "moments")}


def _figures(here: Session, arm: str) -> dict:
    """Figures of the last evaluation, and of the last one after a matched and after a plain epoch."""
    rows = read_metrics(here.path / arm / "evaluations.jsonl")
    metrics = read_metrics(here.path / arm / "metrics.jsonl")
    rates = sorted(row["samples_per_s"] for row in metrics)
    return {
        **(rows[-1] if rows else {}),
        "samples_per_s": rates[len(rates) // 2] if rates else None,
        "steps": metrics[-1]["step"] if metrics else 0,
        "phases": {row["phase"]: row for row in rows},
    }
