"""Which disagreements chance does not explain: counts on the training images against counts on trusted ones.

A *lie* is a caption that names a label the oracle does not see, of an image in which the oracle clearly sees another
label that the caption does not name. The data may hold lies about any model; a model is poisoned where it *repeats*
them: its zero-shot answer is the label that only the caption has. Of a lie that a model did not learn it repeats
no more than it confuses labels anyway.

Two labels *look alike* where model or oracle often take one for the other on trusted images. There a contradiction says that
one of them errs, and the caption may be right: it counts for no label, neither as a lie nor as an answer not seen.

Letters: N images, M captions (an image may have several), C labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.stats import betabinom

MAX_SHRINKAGE = 100.0
"""Weight of the rate over all labels in the rate of one, in images: where labels differ no more than chance makes them."""
SMALLEST_P = 1e-12
"""What the tail's own rounding allows to tell from nothing."""
MIN_EXCESS = 5.0
"""Repeated lies beyond chance, below which a label is not called poisoned: an effect size, in images."""
MIN_BELIEF = 0.5
"""Share of the lies that a poisoned model repeats."""
MIN_MODEL_EXCESS, MIN_MODEL_EXCESS_RATE = 10.0, 0.03
"""Effect size of the test without captions."""
MIN_COPIED = 3
MIN_ALIKE, MIN_ALIKE_RATE = 3, 0.2
"""Trusted images of a label that are taken for another, from which on the two look alike."""
MAX_DRIFT = 3.0
"""How much more often than on trusted images an honest model may disagree on the training images, at most."""


@dataclass(frozen=True)
class Observations:
    """What model, oracle and captions say about N distinct images."""

    answer: np.ndarray
    """(N,) int: the model's zero-shot label."""
    seen: np.ndarray
    """(N, C) bool: the oracle says that the label may be there."""
    clear: np.ndarray
    """(N, C) bool: the oracle says that it certainly is."""
    image: np.ndarray
    """(M,) int: the image of a caption."""
    named: np.ndarray
    """(M, C) bool: the labels that a caption names."""

    @property
    def captions(self) -> np.ndarray:
        """(N,) int: captions of an image."""
        return np.bincount(self.image, minlength=len(self.answer))

    def only(self, images: np.ndarray) -> "Observations":
        """Those of some images; `images` is (N,) bool."""
        number = np.cumsum(images) - 1
        rows = images[self.image]
        return Observations(
            self.answer[images], self.seen[images], self.clear[images], number[self.image[rows]], self.named[rows]
        )

    @cached_property
    def any_named(self) -> np.ndarray:
        """(N, C) bool: some caption of the image names the label."""
        return self._any(self.named)

    def lies(self, confusable: np.ndarray | None = None) -> np.ndarray:
        """(N, C) bool: some caption of the image lies about the label. `alike` (C, C) bool: what looks like which label, and
        does not make one of it a lie."""
        other = self.clear[self.image] & ~self.named
        other = other.any(axis=1, keepdims=True) if confusable is None else other.astype(np.float32) @ ~confusable > 0
        return self._any(self.named & ~self.seen[self.image] & other)

    def answers(self) -> np.ndarray:
        """(N, C) bool: the model's answer, of images that show one of the labels: some caption names one, and the oracle
        clearly sees one. Of others every answer is wrong."""
        return self.says() & self.clear.any(axis=1, keepdims=True) & self.any_named.any(axis=1, keepdims=True)

    def unseen(self, confusable: np.ndarray) -> np.ndarray:
        """(N, C) bool: of those, the answers that the oracle does not see, while it sees what does not look like them."""
        return self.answers() & ~self.seen & (self.clear.astype(np.float32) @ ~confusable > 0)

    def contradicts(self) -> np.ndarray:
        """(N, C) bool: the oracle would call a caption that names the label alone a lie."""
        other = self.clear.sum(axis=1, keepdims=True) > self.clear
        return ~self.seen & other

    def says(self) -> np.ndarray:
        """(N, C) bool: the model's answer."""
        return self.answer[:, None] == np.arange(self.seen.shape[1])

    def _any(self, rows: np.ndarray) -> np.ndarray:
        result = np.zeros(self.seen.shape, dtype=bool)
        np.logical_or.at(result, self.image, rows)
        return result


@dataclass(frozen=True)
class CountTest:
    """k of n images against the null; `p` is one-sided, `p_holm` corrected for all tests of the check."""

    n: int
    k: int
    expected: float
    p: float
    p_holm: float = 1.0

    @property
    def excess(self) -> float:
        return self.k - self.expected


@dataclass(frozen=True)
class LieTest(CountTest):
    """Repeated lies (k) among the images whose captions name a label (n)."""

    lies: int = 0
    """Images with a lie about the label."""
    lies_expected: float = 0.0
    """Of them, those that the oracle's own errors explain."""
    null: float = 0.0
    """Repeated lies that the oracle's own errors explain; `expected` adds those that confusion does."""

    @property
    def belief(self) -> float:
        """Share of the lies that the model repeats, both beyond the oracle's errors; 0 where there are no lies."""
        told = self.lies - self.lies_expected
        return float(np.clip((self.k - self.null) / told, 0, 1)) if told >= 1 else 0.0


@dataclass(frozen=True)
class TestResults:
    """All tests of a check."""

    lies: dict[int, LieTest]
    """By label: does the model repeat lies about it?"""
    model: dict[int, CountTest]
    """By label: does it answer the label, captions aside, where the oracle does not see it?"""
    copied: LieTest | None
    """Over the images that come with several captions: does it repeat lies of any label? None where there are none."""


def confusable_labels(reference: Observations) -> np.ndarray:
    """(C, C) bool, symmetric: of the trusted images that show one label and not the other, model or oracle take
    `MIN_ALIKE_RATE` or more, and at least `MIN_ALIKE`, for the other."""
    named = reference.any_named
    taken = (reference.says() | reference.clear) & ~named
    times = named.T.astype(np.float32) @ taken
    of = named.T.astype(np.float32) @ ~named
    confusable = (times >= MIN_ALIKE) & (times >= MIN_ALIKE_RATE * of)
    return confusable | confusable.T


def run_tests(training: Observations, reference: Observations, covered: Sequence[int]) -> TestResults:
    """Test every covered label, and the images with several captions as a whole; Holm over all of these tests.

    The null of a label is a beta-binomial whose rate comes from the reference, shrunk towards the rate of all labels
    with the weight of `MAX_SHRINKAGE` images or fewer. Training images may differ from trusted ones in other ways than by poison:
    the median ratio of the labels' rates, at least 1 and at most `MAX_DRIFT`, scales the null.
    """
    confusable = confusable_labels(reference)
    t, r = _Counts(training, confusable), _Counts(reference, confusable)
    answers, unseen = _as_frequent(training, reference, confusable)
    covered = list(covered)
    if not covered or not len(training.answer) or not len(reference.answer):
        return TestResults({}, {}, None)
    repeat, told, wrong = (
        _Null(r.repeated, r.named, covered),
        _Null(r.lies, r.named, covered),
        _Null(unseen, answers, covered),
    )
    confused = _Null(r.confused, r.absent, covered)
    repeat_drift, wrong_drift = repeat.drift(t.repeated, t.named), wrong.drift(t.unseen, t.answers)
    lies: dict[int, LieTest] = {}
    model: dict[int, CountTest] = {}
    for c in covered:
        n, k, lied = int(t.named[c]), int(t.repeated[c]), int(t.lies[c])
        null, honest = min(1.0, repeat.rate(c) * repeat_drift), min(1.0, told.rate(c))
        chance = max(0.0, lied - n * honest) * confused.rate(c)
        rate = min(1.0, null + chance / max(1, n))
        lies[c] = LieTest(
            n, k, n * rate, _tail(k, n, rate, repeat.weight(c)), lies=lied, lies_expected=n * honest, null=n * null
        )
        n, k = int(t.answers[c]), int(t.unseen[c])
        rate = min(1.0, wrong.rate(c) * wrong_drift)
        model[c] = CountTest(n, k, n * rate, _tail(k, n, rate, wrong.weight(c)))
    copied = _copied(training, confusable, repeat, told, confused, covered)
    return _holm(TestResults(lies, model, copied))


def _copied(
    training: Observations,
    confusable: np.ndarray,
    repeat: "_Null",
    told: "_Null",
    confused: "_Null",
    covered: list[int],
) -> LieTest | None:
    several = training.captions > 1
    n = int(several.sum())
    if not n:
        return None
    lies = training.lies(confusable)[several][:, covered]
    lied, k = int(lies.any(axis=1).sum()), int((lies & training.says()[several][:, covered]).any(axis=1).sum())
    # An image of several captions may be lied about by each of them.
    labels = float(training.any_named[several][:, covered].sum()) / n
    honest, null = min(1.0, told.pooled * labels), min(1.0, repeat.pooled * labels)
    rate = min(1.0, null + max(0.0, lied - n * honest) * confused.pooled / n)
    p = _tail(k, n, rate, repeat.total)
    return LieTest(n, k, n * rate, p, lies=lied, lies_expected=n * honest, null=n * null)


def _as_frequent(
    training: Observations, reference: Observations, confusable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(C,) each: answers of trusted images and those of them that the oracle does not see, if what it does see were as
    frequent as in training: a label that is taken for another now and then is so often where it is frequent.

    An image weighs w, the mean over the labels seen of how many times as frequent they are; n images count as
    (sum w)^2 / sum w^2 (Kish, Survey Sampling, 1965).
    """
    often, seldom = (seen.clear[seen.any_named.any(axis=1)].sum(axis=0) for seen in (training, reference))
    weights = reference.clear @ (often / np.maximum(seldom, 1)) / np.maximum(reference.clear.sum(axis=1), 1)
    answers, unseen = reference.answers(), reference.unseen(confusable)
    total = weights @ answers
    number = total**2 / np.maximum(weights**2 @ answers, 1e-9)
    return number, number * (weights @ unseen) / np.maximum(total, 1e-9)


class _Counts:
    """Counts by label, all (C,)."""

    def __init__(self, seen: Observations, confusable: np.ndarray):
        lies, says, named = seen.lies(confusable), seen.says(), seen.any_named
        self.named, self.lies = named.sum(axis=0), lies.sum(axis=0)
        self.repeated = (lies & says).sum(axis=0)
        self.answers, self.unseen = seen.answers().sum(axis=0), seen.unseen(confusable).sum(axis=0)
        self.absent, self.confused = (~named).sum(axis=0), (says & ~named).sum(axis=0)


class _Null:
    """Rates on the reference by label, each shrunk towards the rate over all covered labels.

    The less, the more the labels differ: with rates r of n images each, p over all, the rates' own variance is
    v = sum n (r - p)^2 / sum n - L p (1 - p) / sum n, and p weighs p (1 - p) / v - 1 images (a beta-binomial's moments).
    """

    def __init__(self, k: np.ndarray, n: np.ndarray, covered: list[int]):
        self.k, self.n, self.covered = k, n, covered
        self.total = float(n[covered].sum())
        self.pooled = p = float((k[covered].sum() + 0.5) / (self.total + 1))
        rates, images = k[covered] / np.maximum(n[covered], 1), n[covered]
        own = (images @ (rates - p) ** 2 - len(covered) * p * (1 - p)) / max(self.total, 1.0)
        self.shrinkage = float(np.clip(p * (1 - p) / own - 1, 1.0, MAX_SHRINKAGE)) if own > 0 else MAX_SHRINKAGE

    def rate(self, c: int) -> float:
        return float((self.k[c] + self.shrinkage * self.pooled) / (self.n[c] + self.shrinkage))

    def weight(self, c: int) -> float:
        return float(self.n[c] + self.shrinkage)

    def drift(self, k: np.ndarray, n: np.ndarray) -> float:
        ratios = [k[c] / (n[c] * self.rate(c)) for c in self.covered if n[c]]
        return float(np.clip(np.median(ratios), 1.0, MAX_DRIFT)) if ratios else 1.0


def _tail(k: int, n: int, rate: float, weight: float) -> float:
    """P(X >= k) of a beta-binomial with this mean rate, known as well as `weight` images tell it."""
    if k == 0 or n == 0:
        return 1.0
    rate = float(np.clip(rate, 1e-9, 1 - 1e-9))
    return float(np.clip(betabinom.sf(k - 1, n, rate * weight, (1 - rate) * weight), SMALLEST_P, 1.0))


def _holm(findings: TestResults) -> TestResults:
    """The same findings with Holm's correction over all tests."""
    tests: list[tuple[str, int]] = [("lies", c) for c in findings.lies] + [("model", c) for c in findings.model]
    values = [findings.lies[c].p if kind == "lies" else findings.model[c].p for kind, c in tests]
    if findings.copied is not None:
        tests.append(("copied", 0))
        values.append(findings.copied.p)
    corrected, largest = [1.0] * len(values), 0.0
    for place, which in enumerate(np.argsort(values, kind="stable")):
        largest = max(largest, min(1.0, values[which] * (len(values) - place)))
        corrected[which] = largest
    by = dict(zip(tests, corrected, strict=True))
    return TestResults(
        {c: replace(test, p_holm=by[("lies", c)]) for c, test in findings.lies.items()},
        {c: replace(test, p_holm=by[("model", c)]) for c, test in findings.model.items()},
        None if findings.copied is None else replace(findings.copied, p_holm=by[("copied", 0)]),
    )


def poisoned(test: LieTest, alpha: float) -> bool:
    """More repeated lies than chance explains, and most of the lies are repeated."""
    return repeats(test, alpha) and test.belief >= MIN_BELIEF


def repeats(test: LieTest, alpha: float) -> bool:
    """More repeated lies than chance explains."""
    return test.p_holm < alpha and test.excess >= MIN_EXCESS


def poisoned_copies(test: LieTest | None, alpha: float) -> bool:
    """As `poisoned`, for the images with several captions: few of them are enough."""
    return repeats_copies(test, alpha) and test is not None and test.belief >= MIN_BELIEF


def repeats_copies(test: LieTest | None, alpha: float) -> bool:
    """As `repeats`, for the images with several captions."""
    return test is not None and test.p_holm < alpha and test.k >= MIN_COPIED


def model_deviates(test: CountTest, alpha: float) -> bool:
    """The model answers a label where the oracle does not see it, more often than on trusted images."""
    return (
        test.p_holm < alpha
        and test.excess >= MIN_MODEL_EXCESS
        and test.excess >= MIN_MODEL_EXCESS_RATE * max(1, test.n)
    )
