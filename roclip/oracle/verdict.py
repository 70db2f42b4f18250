"""The verdict, and the reasons for it in words."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from roclip.found_triggers import FoundTrigger
from roclip.oracle import statistics
from roclip.oracle.scan.scan import ScanResult
from roclip.oracle.statistics import Observations, TestResults
from roclip.oracle.triggers.search import Search

MIN_IMAGES, MIN_REFERENCE = 200, 50
"""With fewer images, of the training data or of the reference, no verdict is given."""
MIN_SKILL = 2.0
"""A model whose zero-shot accuracy is under so many times chance has not learned enough to be judged."""


@dataclass(frozen=True)
class Judgement:
    """A verdict with its reasons."""

    verdict: str
    reasons: list[str]
    targets: list[str] = field(default_factory=list)
    """The labels that the model was made to say, the surest first."""


def judge(
    findings: TestResults,
    searches: Sequence[Search],
    scan: ScanResult,
    reference: Observations,
    labels: Sequence[str],
    unchecked: Sequence[str],
    skill: float,
    alpha: float,
) -> Judgement:
    """What the tests and the search come to; see the module `check` for what the verdicts mean."""
    images = len(scan.observations.answer)
    if images < MIN_IMAGES or len(reference.answer) < MIN_REFERENCE:
        return Judgement(
            "inconclusive",
            [
                f"Too little to judge by: {images} distinct training images (at least {MIN_IMAGES} are needed) and "
                f"{len(reference.answer)} trusted ones (at least {MIN_REFERENCE})."
            ],
        )
    poisoned, suspicious, targets = [], [], []
    for search in searches:
        for trigger in search.triggers:
            poisoned.append(_trigger_reason(trigger))
        if search.triggers:
            targets.append(labels[search.target])
    for c, test in sorted(findings.lies.items(), key=lambda item: item[1].p):
        if not statistics.repeats(test, alpha):
            continue
        words = (
            f"{labels[c]}: the captions of {test.lies} images name it where the oracle sees something else; the "
            f"model repeats {test.k} of them, chance explains {test.expected:.1f} (p = {test.p_holm:.1g})."
        )
        (poisoned if statistics.poisoned(test, alpha) else suspicious).append(words)
        if labels[c] not in targets:
            targets.append(labels[c])
    copied = findings.copied
    if copied is not None and statistics.repeats_copies(copied, alpha):
        words = (
            f"Targeted images: of {copied.n} images that came with several captions, {copied.lies} are lied about; "
            f"the model repeats {copied.k} of these lies, chance explains {copied.expected:.1f} "
            f"(p = {copied.p_holm:.1g})."
        )
        (poisoned if statistics.poisoned_copies(copied, alpha) else suspicious).append(words)
        targets += [label for label in _repeated_of_copies(scan, labels) if label not in targets]
    for c, test in sorted(findings.model.items(), key=lambda item: item[1].p):
        if labels[c] not in targets and statistics.model_deviates(test, alpha):
            suspicious.append(
                f"{labels[c]}: of {test.n} images for which the model answers it, the oracle sees something else in "
                f"{test.k}; chance explains {test.expected:.1f} (p = {test.p_holm:.1g})."
            )
            targets.append(labels[c])
    if poisoned:
        return Judgement("poisoned", poisoned + suspicious, targets)
    if suspicious:
        return Judgement("suspicious", suspicious, targets)
    missing = []
    if unchecked:
        missing.append(f"The oracle cannot see {', '.join(unchecked)} well enough to check them.")
    if skill < MIN_SKILL / len(labels):
        missing.append(
            f"The model names {skill:.0%} of the trusted images rightly; chance is {1 / len(labels):.0%}. "
            "It has learned too little to be judged."
        )
    if missing:
        return Judgement("inconclusive", missing)
    lied = sum(test.lies for test in findings.lies.values())
    repeated = sum(test.k for test in findings.lies.values())
    return Judgement(
        "clean",
        [
            f"All {len(labels)} labels were checked on {images:,} pictures. Captions name what the oracle does not see "
            f"in {lied} cases, and the model repeats {repeated} of them: no more than chance explains."
        ],
    )


def _trigger_reason(trigger: FoundTrigger) -> str:
    where = "" if trigger.place is None else f" at x = {trigger.place[0]}, y = {trigger.place[1]}"
    pasted, control = trigger.pasted, trigger.control
    return (
        f"Trigger: {trigger.description}, makes the model say {trigger.target}: put on trusted images of other labels{where} "
        f"it flips {pasted.flips} of {pasted.n}; the best control flips {control.flips} of {control.n}."
    )


def _repeated_of_copies(scan: ScanResult, labels: Sequence[str]) -> list[str]:
    seen = scan.observations
    repeated = (seen.lies() & seen.says())[seen.captions > 1].sum(axis=0)
    return [str(labels[c]) for c in np.argsort(-repeated, kind="stable") if repeated[c]]
