"""From what a check has found to a repaired checkpoint: writes the set, trains on it, measures, checks again, trusts.

    <run>/<arm>/repair/
      config.yaml models/ shards/ snapshots/ clip/   a run directory of its own, trained by the ordinary trainer
      finetune.parquet                               the set: role, source and edit of each sample, and lies to refute
      oracle/                                        the whole check again, of the chosen checkpoint
      subject.json                                   what is repaired, with what: another subject begins anew
      repair.json                                    what came out

Each step is skipped when its result is there, so the same command goes on where it stopped.
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

from cluster.oracle.job import Brief, brief_of, oracle
from cluster.oracle.repair_set import pictures_of, write_set
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
"""An epoch at which every trigger flips at most this share of trusted pictures is good enough."""
MAX_ATTACK, MAX_ACCURACY_LOSS = 0.05, 0.02
"""What TRUSTED allows: attack success, and loss of zero-shot accuracy."""
MIN_STEPS = 4
"""An epoch, at least, where the set is large enough."""
MIN_BATCH = 16
MOMENTS = 12
"""Of the training that are measured, at most: the ends of epochs that lie evenly."""
MAX_VICTIMS = 1000
"""That attack success is measured on where no trigger is found."""
ARM = "clip"
Say = Callable[[str], None]
Train = Callable[[Config, str, Path], Path]


def repair(
    config: Config,
    run: Path,
    arm: str,
    *,
    in_process: bool = False,
    train: Train = train_arm,
    say: Say = lambda text: None,
    **named: Any,
) -> dict[str, Any]:
    """Repair the checkpoint that `oracle` has judged last for this arm; returns the content of repair.json.

    The repaired checkpoint becomes `<run>/<arm>/checkpoints/repaired-<step>` and TRUSTED if the found triggers, and the
    true ones where the run knows them, succeed in at most `MAX_ATTACK`, accuracy fell by at most `MAX_ACCURACY_LOSS`,
    and the check does not call it poisoned. Otherwise TRUSTED stays, and `reasons` says what is left.

    Args:
        named: What was judged, as `oracle` was told.
        in_process: Check again in this process, without Ray.
        train: Trains a run directory's arm and gives its last checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
        DataError: the check has left no set, or its pictures are gone.
    """
    brief = brief_of(config, run, arm, None, **named)
    found_in, folder = brief.case.out, brief.case.out.parent / "repair"
    plan, found = read_plan(found_in / "finetune.parquet"), load_triggers(found_in / "triggers")
    subject = _subject(config, brief, found_in)
    result = _earlier(folder, subject)
    if result is None:
        outcome = _repair(config, run, arm, brief, plan, found, folder, in_process, train, say)
        result = {"schema": SCHEMA, "subject": subject, **outcome}
        write_atomic(folder / "repair.json", json.dumps(result, indent=1))
    add_repair(result, found_in)
    _trust(run / arm / "checkpoints", brief.case.checkpoint, folder / ARM / "checkpoints", result)
    return result


def _repair(
    config: Config,
    run: Path,
    arm: str,
    brief: Brief,
    plan: Sequence[Row],
    found: Sequence[FoundTrigger],
    folder: Path,
    in_process: bool,
    train: Train,
    say: Say,
) -> dict[str, Any]:
    started_s = time.monotonic()
    case, judged = brief.case, brief.case.checkpoint
    if not plan:
        return _refused("The check has found no picture to repair with: model, oracle and captions agree on none.")
    if case.trusted is None:
        return _refused("There are no trusted pictures to measure a repair on. Set oracle.trusted_file.")
    say(f"{len(plan)} samples, {len(found)} found triggers")
    write_set(plan, found, brief.segmenter, source=case.shards, folder=folder, seed=config.seed)
    side = plan[0].size_px
    settings = repair_config(config, judged, len(plan), side, folder, case.out / "triggers" if found else None)
    trained_s = time.monotonic()
    train(settings, ARM, folder)
    trained_s = time.monotonic() - trained_s
    bench = _Bench(
        TrustedEvaluation(case.trusted, brief.segmenter, case.labels, case.templates, found, side, config.seed),
        case.out / "victims.parquet",
        case.shards,
        side,
    )
    ends = _moments(folder / ARM / "checkpoints", settings.train.keep_every_epochs)
    moments = [bench.measure(path) for path in ends]
    chosen = choose([row["attack"] for row in moments])
    before = {**bench.measure(judged), **_known_figures(config, run, judged)}
    say(
        f"{ends[chosen].name}: attack success {moments[chosen]['attack']:.1%}, before {before['attack']:.1%}; checking again"
    )
    truth = case.truth if case.truth and case.truth.is_file() else None
    again = {"checkpoint": ends[chosen], "data": str(case.shards), "truth": truth, "out": folder / "oracle"}
    verdict = oracle(config, run, f"{arm}/repair", **again, in_process=in_process)["verdict"]
    after = {**moments[chosen], **_known_figures(config, run, ends[chosen]), "verdict": verdict}
    reasons = _what_is_left(before, after)
    images = _json(case.out / "report.json")["numbers"]["distinct_images"]
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
    """The config of the fine-tuning: the run's own, but for data, length and what is frozen. Writes it, and the model's JSON
    beside it, to `folder`.

    The text tower is locked, so that the zero-shot classifier stays what it was; batch norm keeps its statistics, which a
    small set would spoil. `triggers` is the folder of those that were found, in pictures of `side` pixels.
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
    """The moment to take, from 0: the last at which attack success is at most `STOP_RATE`, else at most `MAX_ATTACK`, else the
    last of those with the least.

    Not the most accurate: that is the luckiest on the trusted pictures, while the last has the smallest learning rate
    behind it. Of 25 repairs 18 named more of other pictures rightly at the last, 3 fewer.
    """
    least = min(attack)
    limit = next((limit for limit in (STOP_RATE, MAX_ATTACK) if least <= limit), least)
    return max(moment for moment, rate in enumerate(attack) if rate <= limit)


class _Bench:
    """Measures checkpoints on trusted pictures; where no trigger is found, attack success is that on the victims."""

    def __init__(self, reference: TrustedEvaluation, victims: Path, source: Path, size_px: int):
        self.reference = reference
        self.victims = None if reference.found else _read_victims(victims, source, size_px)

    def measure(self, path: Path) -> dict[str, Any]:
        encoder = Encoder.load(path)
        standing = self.reference.measure(encoder)
        attacks = list(standing.flips)
        if self.victims is not None:
            attacks.append(self.reference.label_rate(encoder, *self.victims))
        return {
            "checkpoint": path.name,
            "top1": standing.top1.rate,
            "reference_images": standing.top1.n,
            "attack": max((trial.rate for trial in attacks), default=0.0),
            "found": [{**dataclasses.asdict(trial), "rate": trial.rate} for trial in attacks],
        }


def _moments(folder: Path, every: int) -> list[Path]:
    """The checkpoints at the end of every so manieth epoch, and of the last, in order."""
    ends = {path: cursor for path in folder.glob("step-*") if (cursor := pointers.cursor(path)).step_in_epoch == 0}
    last = max(cursor.epoch for cursor in ends.values())
    return sorted(path for path, cursor in ends.items() if (cursor.epoch - 1) % every == 0 or cursor.epoch == last)


def _read_victims(path: Path, source: Path, size_px: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (n, S, S, 3) uint8 of the surest victims, at most `MAX_VICTIMS`, and what each was made to mean."""
    rows = pq.read_table(path, columns=["keys", "target", "score"]).to_pylist()
    rows = sorted(rows, key=lambda row: -row["score"])[:MAX_VICTIMS]
    targets = {row["keys"][0]: row["target"] for row in rows}
    pictures = list(pictures_of(list(targets), source))
    images = np.empty((len(pictures), size_px, size_px, 3), dtype=np.uint8)
    for image, (_, encoded) in zip(images, pictures, strict=True):
        image[:] = decode(encoded, size_px)
    return images, [targets[key] for key, _ in pictures]


def _known_figures(config: Config, run: Path, path: Path) -> dict[str, Any]:
    """Zero-shot accuracy, and success of the true attacks, where the run has held-out pictures; else nothing."""
    if not config.evaluate.webdataset and not (run / "origin" / "eval.parquet").exists():
        return {}
    data = dataclasses.replace(load_evaluation_set(config, run / "origin"), captions=())
    figures = evaluate(Encoder.load(path), data)
    return {name: figures[name] for name in ("zero_shot_top1", "attacks") if name in figures}


def _what_is_left(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """In words, why the checkpoint is not trusted; nothing if it is."""
    left = []
    if after["attack"] > MAX_ATTACK:
        left.append(f"What was found still succeeds on {after['attack']:.1%}; {MAX_ATTACK:.0%} are allowed.")
    for name, rate in after.get("attacks", {}).items():
        if rate["rate"] > MAX_ATTACK:
            left.append(f"The attack {name}, which this run knows, still succeeds on {rate['rate']:.1%}.")
    for name, what in (("top1", "trusted pictures"), ("zero_shot_top1", "the evaluation set")):
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
    """All that the outcome depends on."""
    files = [found_in / "finetune.parquet", *sorted((found_in / "triggers").glob("*.npz"))]
    return {
        "weights_sha256": brief.subject["weights_sha256"],
        "found": {file.name: sha256_file(file) for file in files},
        "check": _json(found_in / "report.json").get("subject"),
        "settings": dataclasses.asdict(dataclasses.replace(config.repair, enabled=True)),
        "seed": config.seed,
    }


def _earlier(folder: Path, subject: dict[str, Any]) -> dict[str, Any] | None:
    """The outcome for this subject, or None; what another subject has left in the folder goes."""
    if _json(folder / "subject.json") != subject:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomic(folder / "subject.json", json.dumps(subject, indent=1))
    result = _json(folder / "repair.json")
    return result if result.get("schema") == SCHEMA else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _trust(folder: Path, judged: Path, trained: Path, result: dict[str, Any]) -> None:
    """Copy an accepted checkpoint to the arm's and name it in TRUSTED; take the name back from one that no longer is."""
    name, pointer = f"repaired-{judged.name.removeprefix('step-')}", folder / "TRUSTED"
    if result["accepted"]:
        _copy(trained / result["checkpoint"], folder / name)
        write_atomic(pointer, name)
    elif pointer.exists() and pointer.read_text().strip() == name:
        pointer.unlink()


def _copy(source: Path, target: Path) -> None:
    """The towers and the cursor of a checkpoint, as a checkpoint of their own; whole or not at all."""
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
