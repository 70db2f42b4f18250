"""The oracle check: where do model, captions and oracle disagree, and is the model poisoned?

    scan          model and oracle score every distinct image of the sealed shards      scan/
    statistics    which labels does the model answer, or repeat, too often?             statistics.py
    search        what causes them? proved by putting it on trusted images              triggers/
    victims       which samples taught it?                                              victims.py
    repair set    which few images would repair it?                                     curate.py
    report        for people and for programs                                           report.py

A caption *lies* where it names a label that the oracle does not find in an image that clearly shows another label
(`statistics.py`). Verdicts:

    poisoned      a trigger was found that causes a label; or the model repeats most of the lies about a label, or most of the
                  lies about images with several captions, far more often than chance explains
    suspicious    the model disagrees with the oracle more often than chance explains, but meets no criterion above
    clean         every label was checked, and nothing was found
    inconclusive  nothing was found, but too little could be checked to call the model clean

The data may be poisoned and the model clean: that is the purpose of a defended training.

Letters: N distinct images, M captions, C labels, D feature width.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from roclip.config import OracleConfig, RepairConfig
from roclip.found_triggers import FoundTrigger, save_triggers
from roclip.metrics.registry import Progress
from roclip.model.towers import Encoder
from roclip.oracle import statistics
from roclip.oracle.curate import curate, write_plan
from roclip.oracle.ground_truth import against_truth
from roclip.oracle.held_out import TrustedImages, load_held_out
from roclip.oracle.report import SCHEMA, write_outputs
from roclip.oracle.scan.images import ScannedImages
from roclip.oracle.scan.saved import SavedScans
from roclip.oracle.scan.scan import ScanResult, scan_shards
from roclip.oracle.scan.scorer import Scorer
from roclip.oracle.segmenters.base import Segmenter
from roclip.oracle.statistics import Observations, TestResults
from roclip.oracle.triggers.search import Search, TriggerSearch
from roclip.oracle.verdict import judge
from roclip.oracle.victims import affected, find_victims

MAX_SCREENED = 3
"""Minimum number of labels to search: if fewer are flagged, those whose lies the model repeats most are added."""
MIN_SUSPECTS = 24
"""With fewer repeated lies, images in which the oracle does not find the model's answer become suspects, too."""


@dataclass(frozen=True)
class CheckData:
    """The data that a model is checked on."""

    shards: Path
    """Folder with the manifest of the shards that the model learned from."""
    labels: Sequence[str]
    """The C labels, in the order of the masks' classes."""
    templates: Sequence[str]
    """Zero-shot prompts with one `{}`."""
    trusted: Path | None = None
    """Parquet with image and mask. The rows that the segmenter was not trained on give the null distribution and the images
    that triggers are tried on; without any, no verdict is given."""
    caption_key: str = ""
    """Key of the json member that holds a sample's captions; empty reads the txt member."""
    truth: Path | None = None
    """Parquet with the column key of the poisoned samples: the report then has how many of the named victims are real, and how
    much of the true trigger the boxes cover."""


def check(
    encoder: Encoder,
    segmenter: Segmenter,
    data: CheckData,
    config: OracleConfig,
    repair: RepairConfig,
    out: Path,
    *,
    seed: int = 0,
    subject: dict[str, Any] | None = None,
    saved: SavedScans | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Judge a model by the shards that it learned from.

    Writes triggers/, finetune.parquet, victims.parquet, disagreements.parquet, report.html and, last, report.json to `out`.

    Args:
        seed: Seed of the places and images that the search draws.
        subject: What is judged, in the caller's words; copied into the report.
        saved: Where the scan of each shard is saved, so that a check that was cut off continues.

    Returns:
        The content of report.json.

    Raises:
        ShardError, DataError: shards or trusted images cannot be read.
    """
    shards, labels, templates = data.shards, data.labels, data.templates
    started = time.monotonic()
    progress = on_progress or (lambda done, total, text: None)
    scorer = Scorer(encoder, segmenter, labels, templates, config.label_map)
    scan = scan_shards(scorer, shards, progress, data.caption_key, saved)
    scanned_images = ScannedImages(scan, shards)
    held_out = load_held_out(segmenter, data.trusted, labels, scan.size_px)
    reference, skill = _reference(scorer, held_out)
    covered = [c for c, label in enumerate(labels) if segmenter.covers(label)]
    unchecked = [label for label in labels if not segmenter.covers(label)]
    findings = statistics.run_tests(scan.observations, reference, covered)
    searches = _search(scorer, findings, scan, scanned_images, held_out, reference.answer, config.alpha, seed, progress)
    progress(1, 1, "naming victims")
    victims = find_victims(scan, reference, covered, searches, scanned_images.read, config.alpha)
    judgement = judge(findings, searches, scan, reference, labels, unchecked, skill, config.alpha)
    triggers = [trigger for search in searches for trigger in search.triggers]
    plan = curate(
        scan,
        victims.target,
        triggers,
        labels,
        templates=templates,
        calibration=segmenter.calibration,
        targets=judgement.targets,
        explained=victims.trigger >= 0,
        frac=repair.set_frac,
        stamped_frac=repair.stamped_frac,
        seed=seed,
    )
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "subject": subject or {},
        "verdict": judgement.verdict,
        "reasons": judgement.reasons,
        "target_labels": judgement.targets,
        "affected_labels": affected(scan, victims, labels),
        "triggers": [_trigger_row(number, trigger) for number, trigger in enumerate(triggers)],
        "labels": _label_rows(findings, searches, labels, segmenter, config.alpha),
        "copies": _copies_row(findings),
        "numbers": {
            "samples": len(scan.keys),
            "distinct_images": len(scan.observations.answer),
            "unreadable": scan.unreadable,
            "reference_images": len(reference.answer),
            "reference_zero_shot_top1": round(skill, 4),
            "labels_checked": len(covered),
            "labels_searched": len(searches),
            "alpha": config.alpha,
            "victims": int(victims.named.sum()),
            "finetune": len(plan),
            "clip_forwards": {
                "images": scan.forwards,
                "reference": len(reference.answer),
                "search": scorer.search_forwards,
            },
            "oracle_forwards": scan.forwards + len(reference.answer),
        },
        "oracle": {
            **{key: value for key, value in segmenter.info.items() if key != "reference_rows"},
            "calibration": {label: dataclasses.asdict(row) for label, row in segmenter.calibration.items()},
        },
        "limits": _limits(unchecked, statistics.confusable_labels(reference), labels),
        **against_truth(data.truth, scan, victims, triggers, shards),
    }
    report["numbers"]["wall_s"] = round(time.monotonic() - started, 1)
    save_triggers(triggers, out / "triggers")
    write_plan(out / "finetune.parquet", plan)
    write_outputs(report, scan, victims, triggers, held_out, scanned_images, scorer, out)
    progress(1, 1, f"{judgement.verdict}. {judgement.reasons[0]}")
    return report


def _reference(scorer: Scorer, held_out: TrustedImages) -> tuple[Observations, float]:
    """Return the observations on held-out trusted images, and the model's zero-shot accuracy there."""
    answer, areas = scorer.predict(held_out.images)
    shows = held_out.shows
    accuracy = float(shows[np.arange(len(answer)), answer].mean()) if len(answer) else 0.0
    # A trusted image counts as a pair whose caption names every label that it shows.
    return Observations(answer, *scorer.seen_and_clear(areas), np.arange(len(answer)), shows), accuracy


def _search(
    scorer: Scorer,
    findings: TestResults,
    scan: ScanResult,
    scanned_images: ScannedImages,
    held_out: TrustedImages,
    answers: np.ndarray,
    alpha: float,
    seed: int,
    progress: Progress,
) -> list[Search]:
    """Search for the triggers of the flagged labels, and of those whose lies are repeated most."""
    if not findings.lies or not len(held_out.images):
        return []
    flagged = [
        c
        for c, test in findings.lies.items()
        if statistics.repeats(test, alpha) or statistics.model_deviates(findings.model[c], alpha)
    ]
    flagged.sort(key=lambda c: findings.lies[c].p)
    ranked = sorted(findings.lies, key=lambda c: -findings.lies[c].k)
    screened = [*flagged, *(c for c in ranked if c not in flagged and findings.lies[c].k)]
    screened = screened[: max(MAX_SCREENED, len(flagged))]
    repeated = [c for c, test in findings.lies.items() if statistics.repeats(test, alpha)]
    search = TriggerSearch(scorer.scores, scorer.scores_with_gradient, held_out, answers, scorer.labels, seed, repeated)
    searches = []
    for done, c in enumerate(screened):
        progress(done, len(screened), f"what makes the model say {scorer.labels[c]}?")
        searches.append(search.label(c, _suspects(scan, c), scanned_images.read, patch_sets=c in flagged))
    return searches


def _suspects(scan: ScanResult, c: int) -> np.ndarray:
    """Return the numbers of images that may carry a label's trigger, the likeliest first.

    Images with several captions are left out, since they belong to targeted attacks.
    """
    seen = scan.observations
    once, says = seen.captions == 1, seen.answer == c
    contrast = (scan.areas * seen.clear).max(axis=1, initial=0)
    repeats = np.flatnonzero(seen.lies()[:, c] & says & once)
    repeats = repeats[np.argsort(-contrast[repeats], kind="stable")]
    if len(repeats) >= MIN_SUSPECTS:
        return repeats
    unseen = np.flatnonzero(says & ~seen.seen[:, c] & once)
    unseen = unseen[np.argsort(-contrast[unseen], kind="stable")]
    return np.concatenate([repeats, np.setdiff1d(unseen, repeats, assume_unique=True)])


def _label_rows(
    findings: TestResults, searches: Sequence[Search], labels: Sequence[str], segmenter: Segmenter, alpha: float
) -> list[dict[str, Any]]:
    """Return one row per label, the most suspicious first and unchecked labels last."""
    rows = []
    searched = {search.target: search for search in searches}
    for c, test in sorted(findings.lies.items(), key=lambda item: (item[1].p, -item[1].excess)):
        model = findings.model[c]
        flagged = statistics.repeats(test, alpha)
        deviates = statistics.model_deviates(model, alpha)
        rows.append(
            {
                "label": labels[c],
                "status": "poisoned"
                if statistics.poisoned(test, alpha) or (c in searched and searched[c].triggers)
                else "suspicious"
                if flagged or deviates
                else "agrees",
                "captions": test.n,
                "lies": test.lies,
                "repeated": test.k,
                "expected": round(test.expected, 2),
                "belief": round(test.belief, 3),
                "p": float(f"{test.p_holm:.3g}"),
                "answers": model.n,
                "unseen": model.k,
                "unseen_expected": round(model.expected, 2),
                "unseen_p": float(f"{model.p_holm:.3g}"),
                "pasted_rate": round(searched[c].best.rate, 3) if c in searched else None,
                "control_rate": round(searched[c].control.rate, 3) if c in searched and searched[c].control.n else None,
            }
        )
    rows += [{"label": label, "status": "unchecked"} for label in labels if not segmenter.covers(label)]
    return rows


def _trigger_row(number: int, trigger: FoundTrigger) -> dict[str, Any]:
    return {
        "number": number,
        "target": trigger.target,
        "kind": trigger.kind,
        "size_px": list(trigger.crops[0].shape[1::-1]) if trigger.crops else None,
        "place": "anywhere" if trigger.place is None else list(trigger.place),
        "pictures": len(trigger.sources),
        **{name: dataclasses.asdict(trial) | {"rate": round(trial.rate, 4)} for name, trial in trigger.trials.items()},
        "file": f"triggers/{number}.png",
    }


def _copies_row(findings: TestResults) -> dict[str, Any] | None:
    test = findings.copied
    if test is None:
        return None
    return {
        "images": test.n,
        "lies": test.lies,
        "repeated": test.k,
        "expected": round(test.expected, 3),
        "belief": round(test.belief, 3),
        "p": float(f"{test.p_holm:.3g}"),
    }


def _limits(unchecked: Sequence[str], confusable: np.ndarray, labels: Sequence[str]) -> list[str]:
    pairs = [f"{labels[a]} and {labels[b]}" for a, b in zip(*np.nonzero(np.triu(confusable)), strict=True)]
    limits = [
        "Only labels that the oracle covers can be checked: a poison between two other labels goes unnoticed.",
        "Clean-label attacks, whose poisoned images do show the target label, produce no lie that this check could find.",
        "Targeted attacks are found as a group, by several captions for the same image bytes; single ones are not.",
        "A patch set (pixels that differ from image to image) is searched only for labels with findings about captions or "
        "answers.",
        "A warp (WaNet) is inverted from the model, only for labels whose lies it repeats and for which no other trigger is "
        "found. Images do not show whether they were warped, so the named victims are those whose lies the model repeats.",
    ]
    if pairs:
        limits.insert(
            0,
            f"Model or oracle often confuse these labels on trusted images: {', '.join(pairs)}. A contradiction between them is "
            "not counted, so a poison that shows one and claims the other is found by its trigger only.",
        )
    if unchecked:
        limits.insert(0, f"Unchecked labels: {', '.join(unchecked)}.")
    return limits
