"""Repairs a checkpoint that a check found poisoned: writes the set, fine-tunes on it, measures, checks again, trusts.

    <run>/<arm>/repair/
      config.yaml models/ shards/ snapshots/ clip/   a run directory of its own, trained by the ordinary trainer
      finetune.parquet                               the set: role, source and edit of each sample, and the lies to unlearn
      oracle/                                        the whole check again, of the chosen checkpoint
      subject.json                                   what is repaired, with what; another subject starts from scratch
      repair.json                                    the outcome

Each step is skipped when its result exists, so the same command continues where it stopped.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.oracle.job import Brief, brief_of, oracle, point_trusted, read_result
from cluster.oracle.repair_set import images_of, write_set
from cluster.oracle.request import NEWEST, OracleRequest
from cluster.train.job import train_arm
from roclip.checkpoint import pointers
from roclip.config import AttacksConfig, Config, DataConfig, dump_config
from roclip.data.reader import decode
from roclip.evaluation.evaluate import evaluate
from roclip.evaluation.sets import load_evaluation_set
from roclip.found_triggers import FoundTrigger, load_triggers
from roclip.model.towers import CONFIG, WEIGHTS, Encoder
from roclip.oracle.curate import Row, read_plan
from roclip.oracle.measure import TrustedEvaluation
from roclip.oracle.report import add_repair
from roclip.storage import sha256_file, write_atomic

SCHEMA = 1
STOP_RATE = 0.01
"""Attack success at which a checkpoint is good enough: the share of trusted images that a trigger flips."""
MAX_ATTACK, MAX_ACCURACY_LOSS = 0.05, 0.02
"""Limits for TRUSTED: attack success, and the loss of zero-shot accuracy, as shares."""
MIN_STEPS = 4
"""Steps an epoch, at least, where the set is large enough."""
MIN_BATCH = 16
MOMENTS = 12
"""Checkpoints of the training that are measured, at most: ends of epochs at equal distances."""
MAX_VICTIMS = 1000
"""Victims on which attack success is measured where no trigger is found, at most."""
ARM = "clip"
Say = Callable[[str], None]
Train = Callable[[Config, str, Path], Path]


def repair(
    config: Config,
    run: Path,
    arm: str,
    request: OracleRequest = NEWEST,
    *,
    train: Train = train_arm,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Repair the checkpoint that `oracle` judged last for the same request; returns the content of repair.json.

    The repaired checkpoint becomes `<run>/<arm>/checkpoints/repaired-<step>` and TRUSTED if the found triggers, and the
    true ones where the run knows them, succeed on at most `MAX_ATTACK`, accuracy fell by at most `MAX_ACCURACY_LOSS`,
    and the second check does not call it poisoned. Otherwise TRUSTED stays, and `reasons` says what is left.

    Args:
        train: Trains an arm of a run directory and returns its last checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
        DataError: the check has left no set, or its images are gone.
    """
    brief = brief_of(config, run, arm, request)
    found_in, folder = brief.case.out, brief.case.out.parent / "repair"
    plan, found = read_plan(found_in / "finetune.parquet"), load_triggers(found_in / "triggers")
    subject = _subject(config, brief, found_in)
    result = _earlier(folder, subject)
    if result is None:
        outcome = _repair(config, run, arm, request, brief, plan, found, folder, train, say)
        result = {"schema": SCHEMA, "subject": subject, **outcome}
        write_atomic(folder / "repair.json", json.dumps(result, indent=1))
    add_repair(result, found_in)
    _trust(run / arm / "checkpoints", brief.case.checkpoint, folder / ARM / "checkpoints", result)
    return result


def _repair(
    config: Config,
    run: Path,
    arm: str,
    request: OracleRequest,
    brief: Brief,
    plan: Sequence[Row],
    found: Sequence[FoundTrigger],
    folder: Path,
    train: Train,
    say: Say,
) -> dict[str, Any]:
    started_s = time.monotonic()
    case, data, judged = brief.case, brief.case.data, brief.case.checkpoint
    if not plan:
        return _refused("The check has found no image to repair with: model, oracle and captions agree on none.")
    if data.trusted is None:
        return _refused("There are no trusted images to measure a repair on. Set oracle.trusted_file.")
    say(f"{len(plan)} samples, {len(found)} found triggers")
    write_set(plan, found, brief.segmenter, source=data.shards, folder=folder, seed=config.seed)
    side_px = plan[0].size_px
    settings = repair_config(config, judged, len(plan), side_px, folder, case.out / "triggers" if found else None)
    trained_s = time.monotonic()
    train(settings, ARM, folder)
    trained_s = time.monotonic() - trained_s
    measurements = _Measurements(
        TrustedEvaluation(data.trusted, brief.segmenter, data.labels, data.templates, found, side_px, config.seed),
        case.out / "victims.parquet",
        data.shards,
        side_px,
    )
    ends = _ends_of_epochs(folder / ARM / "checkpoints", settings.train.keep_every_epochs)
    moments = [measurements.of(path) for path in ends]
    chosen = choose([row["attack"] for row in moments])
    before = {**measurements.of(judged), **_known_figures(config, run, judged)}
    say(
        f"{ends[chosen].name}: attack success {moments[chosen]['attack']:.1%}, before {before['attack']:.1%}; checking again"
    )
    again = OracleRequest(
        checkpoint=str(ends[chosen]),
        data=str(data.shards),
        truth=data.truth if data.truth and data.truth.is_file() else None,
        out=folder / "oracle",
        in_process=request.in_process,
    )
    verdict = oracle(config, run, f"{arm}/repair", again)["verdict"]
    after = {**moments[chosen], **_known_figures(config, run, ends[chosen]), "verdict": verdict}
    reasons = _what_is_left(before, after)
    images = read_result(case.out / "report.json")["numbers"]["distinct_images"]
    return {
        "accepted": not reasons,
        "reasons": reasons,
        "judged": judged.name,
        "checkpoint": ends[chosen].name,
        "samples": len(plan),
        "share": len(plan) / images,
        "roles": {role: sum(row.role == role for row in plan) for role in ("anchor", "stamped", "repaired")},
        "moments": moments,
        "before": before,
        "after": after,
        "train_s": round(trained_s, 1),
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def repair_config(
    config: Config, judged: Path, samples: int, side: int, folder: Path, triggers: Path | None = None
) -> Config:
    """The config of the fine-tuning: the run's own except for data, length and what is frozen. It is written to `folder`, with
    the model's JSON beside it.

    The text tower is locked, so that the zero-shot classifier does not change; batch norm keeps its statistics, which a small
    set would spoil.

    Args:
        side: Side of the images in which triggers were found, in pixels.
        triggers: Folder of the found triggers; None where none was found.
    """
    card, wanted = json.loads((judged / CONFIG).read_text()), config.repair
    name = card.get("roclip_model", config.model.name)
    write_atomic(folder / "models" / f"{name}.json", json.dumps(card["model_cfg"], indent=1))
    batch = min(wanted.batch_size, max(MIN_BATCH, math.ceil(samples / MIN_STEPS)), samples)
    epochs = max(wanted.epochs, math.ceil(wanted.steps / math.ceil(samples / batch)))
    settings = dataclasses.replace(
        config,
        name="repair",
        evaluate=dataclasses.replace(config.evaluate, webdataset=""),
        run_dir=str(folder.resolve()),
        source=str((folder / "config.yaml").resolve()),
        arms=(ARM,),
        attacks=AttacksConfig(),
        ingest=dataclasses.replace(config.ingest, image_size=side),
        data=DataConfig(shards=str((folder / "shards").resolve()), last_batch="pad"),
        model=dataclasses.replace(
            config.model,
            name=name,
            pretrained=str(judged.resolve()),
            freeze_bn_stats=True,
            lock_image=False,
            lock_image_unlocked_groups=0,
            lock_image_freeze_bn_stats=False,
            lock_text=True,
            lock_text_unlocked_layers=0,
        ),
        repair=dataclasses.replace(
            wanted,
            enabled=False,
            triggers=str(triggers.resolve()) if triggers and wanted.distillation_weight else "",
            finetune=str((folder / "finetune.parquet").resolve()) if wanted.distillation_weight else "",
        ),
        train=dataclasses.replace(
            config.train,
            epochs=epochs,
            global_batch_size=batch,
            lr=wanted.lr,
            warmup_epochs=epochs / MOMENTS,
            objective="repair",
            keep_every_epochs=math.ceil(epochs / MOMENTS),
            checkpoint_store="",
            loggers=(),
            log_every_steps=1,
        ),
    )
    write_atomic(folder / "config.yaml", dump_config(settings))
    return settings


def choose(attack: Sequence[float]) -> int:
    """Index of the checkpoint to take: the last one with attack success of at most `STOP_RATE`, else of at most `MAX_ATTACK`,
    else the last one of those with the lowest.

    It is not the most accurate one: accuracy on the trusted images picks a lucky one, while the last one ended at the smallest
    learning rate. In 25 repairs the last one was more accurate on other images 18 times, and less accurate 3 times.
    """
    least = min(attack)
    limit = next((limit for limit in (STOP_RATE, MAX_ATTACK) if least <= limit), least)
    return max(moment for moment, rate in enumerate(attack) if rate <= limit)


class _Measurements:
    """Measures checkpoints on trusted images; attack success is that of the found triggers, or that on the victims where no
    trigger is found."""

    def __init__(self, reference: TrustedEvaluation, victims: Path, source: Path, size_px: int):
        self.reference = reference
        self.victims = None if reference.found else _read_victims(victims, source, size_px)

    def of(self, path: Path) -> dict[str, Any]:
        encoder = Encoder.load(path)
        measured = self.reference.measure(encoder)
        attacks = list(measured.flips)
        if self.victims is not None:
            attacks.append(self.reference.label_rate(encoder, *self.victims))
        return {
            "checkpoint": path.name,
            "top1": measured.top1.rate,
            "reference_images": measured.top1.n,
            "attack": max((trial.rate for trial in attacks), default=0.0),
            "found": [{**dataclasses.asdict(trial), "rate": trial.rate} for trial in attacks],
        }


def _ends_of_epochs(folder: Path, every: int) -> list[Path]:
    """The checkpoints at the end of every `every`-th epoch, and of the last epoch, in order."""
    ends = {path: cursor for path in folder.glob("step-*") if (cursor := pointers.cursor(path)).step_in_epoch == 0}
    last = max(cursor.epoch for cursor in ends.values())
    return sorted(path for path, cursor in ends.items() if (cursor.epoch - 1) % every == 0 or cursor.epoch == last)


def _read_victims(path: Path, source: Path, size_px: int) -> tuple[np.ndarray, list[str]]:
    """Images (n, S, S, 3) uint8 of the most certain victims, at most `MAX_VICTIMS`, and the label that each was poisoned to."""
    rows = pq.read_table(path, columns=["keys", "target", "score"]).to_pylist()
    rows = sorted(rows, key=lambda row: -row["score"])[:MAX_VICTIMS]
    targets = {row["keys"][0]: row["target"] for row in rows}
    encoded = list(images_of(list(targets), source))
    images = np.empty((len(encoded), size_px, size_px, 3), dtype=np.uint8)
    for image, (_, content) in zip(images, encoded, strict=True):
        image[:] = decode(content, size_px)
    return images, [targets[key] for key, _ in encoded]


def _known_figures(config: Config, run: Path, path: Path) -> dict[str, Any]:
    """Zero-shot accuracy and success of the true attacks, where the run has held-out images; otherwise empty."""
    if not config.evaluate.webdataset and not (run / "origin" / "eval.parquet").exists():
        return {}
    data = dataclasses.replace(load_evaluation_set(config, run / "origin"), captions=())
    figures = evaluate(Encoder.load(path), data)
    return {name: figures[name] for name in ("zero_shot_top1", "attacks") if name in figures}


def _what_is_left(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The reasons why a repaired checkpoint is not trusted; empty if it is."""
    left = []
    if after["attack"] > MAX_ATTACK:
        left.append(f"What was found still succeeds on {after['attack']:.1%}; {MAX_ATTACK:.0%} are allowed.")
    for name, rate in after.get("attacks", {}).items():
        if rate["rate"] > MAX_ATTACK:
            left.append(f"The attack {name}, which this run knows, still succeeds on {rate['rate']:.1%}.")
    for name, what in (("top1", "trusted images"), ("zero_shot_top1", "the evaluation set")):
        if before.get(name, 0.0) - after.get(name, 0.0) > MAX_ACCURACY_LOSS:
            left.append(
                f"Zero-shot accuracy on {what} fell from {before[name]:.1%} to {after[name]:.1%}; "
                f"{100 * MAX_ACCURACY_LOSS:.0f} points are allowed."
            )
    if after["verdict"] == "poisoned":
        left.append("The check, done again, calls the repaired checkpoint poisoned; its report says why.")
    return left


def _refused(reason: str) -> dict[str, Any]:
    return {"accepted": False, "reasons": [reason], "samples": 0}


def _subject(config: Config, brief: Brief, found_in: Path) -> dict[str, Any]:
    """All that the outcome depends on: an equal subject is not repaired again."""
    files = [found_in / "finetune.parquet", *sorted((found_in / "triggers").glob("*.npz"))]
    return {
        "weights_sha256": brief.subject["weights_sha256"],
        "found": {file.name: sha256_file(file) for file in files},
        "check": read_result(found_in / "report.json").get("subject"),
        "settings": dataclasses.asdict(dataclasses.replace(config.repair, enabled=True)),
        "seed": config.seed,
    }


def _earlier(folder: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    """The outcome for this subject, or None. Files of another subject are removed from the folder."""
    if read_result(folder / "subject.json") != subject:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomic(folder / "subject.json", json.dumps(subject, indent=1))
    result = read_result(folder / "repair.json")
    return result if result.get("schema") == SCHEMA else None


def _trust(folder: Path, judged: Path, trained: Path, result: dict[str, Any]) -> None:
    """Copy an accepted checkpoint to the arm's checkpoints, and point TRUSTED as the result says."""
    name = f"repaired-{judged.name.removeprefix('step-')}"
    if result["accepted"]:
        _copy(trained / result["checkpoint"], folder / name)
    point_trusted(folder, name, result["accepted"])


def _copy(source: Path, target: Path) -> None:
    """Copy towers and cursor of a checkpoint, as a checkpoint of their own, atomically."""
    pointers.verify(source)
    sums = pointers.parse_sums((source / pointers.SUMS).read_text(), source / pointers.SUMS)
    kept = {name: sums[name] for name in sorted(sums) if name in (CONFIG, WEIGHTS, "cursor.json")}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in kept:
        shutil.copyfile(source / name, partial / name)
    write_atomic(partial / pointers.SUMS, "".join(f"{sum_}  {name}\n" for name, sum_ in kept.items()))
    pointers.verify(partial)
    pointers.remove(target)
    os.replace(partial, target)
