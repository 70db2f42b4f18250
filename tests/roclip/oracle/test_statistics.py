"""The tests of the check: few false alarms on honest data, and power where there is poison."""

import dataclasses

import numpy as np
import pytest

from roclip.oracle import statistics
from roclip.oracle.statistics import Observations, run_tests

C = 12


def honest(rng: np.random.Generator, n: int, accuracy: float = 0.85, recall: float = 0.95) -> Observations:
    """One object an image; model and oracle err independently, on some labels more than on others."""
    truth = rng.integers(0, C, n)
    there = np.eye(C, dtype=bool)[truth]
    uneven = np.linspace(-1, 1, C)
    right = rng.random(n) < (accuracy + 0.1 * uneven[::-1])[truth]
    answer = np.where(right, truth, rng.integers(0, C, n))
    seen = there & (rng.random((n, C)) < recall + 0.04 * uneven)
    clear = seen | (rng.random((n, C)) < 0.005)
    return Observations(answer, seen | clear, clear, np.arange(n), there)


def lie(rng: np.random.Generator, data: Observations, count: int, target: int, belief: float) -> Observations:
    """The captions of `count` images name the target instead; the model repeats it with this probability."""
    rows = rng.choice(np.flatnonzero(~data.named[:, target]), count, replace=False)
    named, answer = data.named.copy(), data.answer.copy()
    named[rows] = np.arange(C) == target
    answer[rows] = np.where(rng.random(count) < belief, target, answer[rows])
    return dataclasses.replace(data, named=named, answer=answer)


def alarms(findings: statistics.TestResults, alpha: float = 0.01) -> bool:
    return (
        any(statistics.repeats(test, alpha) for test in findings.lies.values())
        or any(statistics.model_deviates(test, alpha) for test in findings.model.values())
        or statistics.repeats_copies(findings.copied, alpha)
    )


@pytest.mark.parametrize("accuracy", [0.4, 0.9])
def test_false_alarms_are_rare_when_the_data_are_honest(accuracy: float):
    rng = np.random.default_rng(0)
    rounds = [alarms(run_tests(honest(rng, 4000, accuracy), honest(rng, 600, accuracy), range(C))) for _ in range(100)]
    assert sum(rounds) <= 2


@pytest.mark.parametrize(("accuracy", "recall"), [(0.9, 0.95), (0.6, 0.9)])
def test_backdoor_is_found_when_the_model_learned_it(accuracy: float, recall: float):
    rng = np.random.default_rng(1)
    for _ in range(20):
        training = lie(rng, honest(rng, 4000, accuracy, recall), 60, target=3, belief=0.8)
        findings = run_tests(training, honest(rng, 600, accuracy, recall), range(C))
        assert statistics.poisoned(findings.lies[3], 0.01)
        assert sum(statistics.repeats(test, 0.01) for test in findings.lies.values()) == 1


@pytest.mark.parametrize("accuracy", [0.4, 0.9])
def test_alarms_stay_rare_when_the_data_lie_and_the_model_does_not_believe(accuracy: float):
    rng = np.random.default_rng(2)
    rounds = [
        alarms(
            run_tests(
                lie(rng, honest(rng, 4000, accuracy), 100, target=3, belief=0.0), honest(rng, 600, accuracy), range(C)
            )
        )
        for _ in range(100)
    ]
    assert sum(rounds) <= 2


def test_belief_is_the_share_of_lies_that_is_repeated():
    rng = np.random.default_rng(3)
    training = lie(rng, honest(rng, 4000), 200, target=0, belief=0.3)
    test = run_tests(training, honest(rng, 600), range(C)).lies[0]
    assert test.belief == pytest.approx(0.3, abs=0.1)
    assert statistics.repeats(test, 0.01)
    assert not statistics.poisoned(test, 0.01)


def test_rates_that_rise_for_all_labels_are_no_poison():
    rng = np.random.default_rng(4)
    findings = run_tests(honest(rng, 6000, recall=0.9), honest(rng, 600, recall=0.95), range(C))
    assert not alarms(findings)


def test_uncovered_labels_are_not_tested():
    rng = np.random.default_rng(5)
    findings = run_tests(honest(rng, 500), honest(rng, 200), [0, 4])
    assert set(findings.lies) == set(findings.model) == {0, 4}
    assert run_tests(honest(rng, 500), honest(rng, 200), []).lies == {}


def test_a_true_caption_does_not_hide_the_lie_of_another_one():
    there = np.eye(C, dtype=bool)
    data = Observations(np.array([1]), there[[0]], there[[0]], np.array([0, 0]), there[[0, 1]])
    assert data.lies().nonzero() == (np.array([0]), np.array([1]))
    assert data.captions.tolist() == [2]


def test_a_label_is_contradicted_when_it_is_not_seen_and_something_else_is_sure():
    there = np.eye(C, dtype=bool)
    seen, clear = there[[0]] | there[[1]], there[[0]]
    data = Observations(np.array([1]), seen, clear, np.array([0]), there[[0]])
    assert data.contradicts()[0].tolist() == [label > 1 for label in range(C)]
    nothing_sure = Observations(np.array([1]), seen, np.zeros_like(clear), np.array([0]), there[[0]])
    assert not nothing_sure.contradicts().any()


def test_holm_orders_and_bounds_the_corrected_values():
    rng = np.random.default_rng(6)
    training = lie(rng, honest(rng, 3000), 80, target=2, belief=1.0)
    findings = run_tests(training, honest(rng, 500), range(C))
    tests = sorted([*findings.lies.values(), *findings.model.values()], key=lambda test: test.p)
    corrected = [test.p_holm for test in tests]
    assert corrected == sorted(corrected)
    assert corrected[0] == pytest.approx(tests[0].p * len(tests))
    assert max(corrected) <= 1


def confuse(rng: np.random.Generator, data: Observations, label: int, other: int, share: float) -> Observations:
    """Oracle and model each take this share of a label's images for the other; the captions stay true."""
    seen, clear, answer = data.seen.copy(), data.clear.copy(), data.answer.copy()
    rows = np.flatnonzero(data.named[:, label])
    mistaken, misread = rows[rng.random(len(rows)) < share], rows[rng.random(len(rows)) < share]
    for sees in (seen, clear):
        sees[np.ix_(mistaken, [label])], sees[np.ix_(mistaken, [other])] = False, True
    answer[misread] = other
    return dataclasses.replace(data, seen=seen, clear=clear, answer=answer)


def test_confusable_labels_are_those_that_are_taken_for_one_another():
    rng = np.random.default_rng(4)
    alike = statistics.confusable_labels(confuse(rng, honest(rng, 600, accuracy=0.9), 4, 7, 0.5))
    assert sorted(zip(*map(list, np.nonzero(alike)), strict=True)) == [(4, 7), (7, 4)]


def test_confusable_labels_raise_no_alarm_though_the_oracle_errs_on_training_images_more():
    """As shoes of two kinds did: on 25 trusted images of one the oracle made no error, on 111 others 19."""
    rng = np.random.default_rng(5)
    rounds = []
    for _ in range(50):
        reference = confuse(rng, honest(rng, 600), 7, 4, 0.4)
        rounds.append(alarms(run_tests(confuse(rng, honest(rng, 4000), 4, 7, 0.3), reference, range(C))))
    assert sum(rounds) <= 1


def test_backdoor_is_found_though_its_label_has_a_confusable_one():
    rng = np.random.default_rng(6)
    training = lie(rng, confuse(rng, honest(rng, 4000), 4, 7, 0.4), 60, target=4, belief=0.8)
    findings = run_tests(training, confuse(rng, honest(rng, 600), 4, 7, 0.4), range(C))
    assert statistics.poisoned(findings.lies[4], 0.01)


def often(reference: Observations, times: np.ndarray) -> Observations:
    """Training images of one label each, of which the oracle sees each (C,) so many times as often as on trusted ones."""
    there = np.eye(C, dtype=bool)[np.repeat(np.arange(C), times * reference.clear.sum(axis=0))]
    return Observations(there.argmax(axis=1), there, there, np.arange(len(there)), there)


def copies(data: Observations, times: np.ndarray) -> Observations:
    """Each of N images with one caption (N,) so many times."""
    rows = np.repeat(np.arange(len(times)), times)
    return Observations(data.answer[rows], data.seen[rows], data.clear[rows], np.arange(len(rows)), data.named[rows])


def test_trusted_images_count_as_they_are_where_training_shows_every_label_as_often():
    reference = honest(np.random.default_rng(7), 600)
    alike = statistics.confusable_labels(reference)
    answers, unseen = statistics._reweighted(often(reference, np.full(C, 3)), reference, alike)
    assert answers == pytest.approx(reference.judged_answers().sum(axis=0))
    assert unseen == pytest.approx(reference.unseen(alike).sum(axis=0))


def test_trusted_images_weigh_as_copies_do_where_training_shows_labels_more_or_less_often():
    rng = np.random.default_rng(8)
    reference = honest(rng, 600, accuracy=0.7)
    times = 6 * rng.integers(1, 8, C)  # the mean of one, two or three of them is whole
    each = (reference.clear @ times) // np.maximum(reference.clear.sum(axis=1), 1)
    copied = copies(reference, each)
    alike = statistics.confusable_labels(reference)
    answers, unseen = statistics._reweighted(often(reference, times), reference, alike)
    expected = copied.unseen(alike).sum(axis=0) / copied.judged_answers().sum(axis=0)
    assert unseen / answers == pytest.approx(expected)
    assert np.abs(expected - reference.unseen(alike).sum(axis=0) / reference.judged_answers().sum(axis=0)).max() > 0.05
    weights = [each[reference.judged_answers()[:, c]] for c in range(C)]
    assert answers == pytest.approx([of.sum() ** 2 / (of**2).sum() for of in weights])


def test_alarms_are_rare_where_training_shows_a_label_far_more_often():
    """What the model takes for another now and then, it does so often where it is frequent."""
    rng = np.random.default_rng(9)

    def misread(n: int) -> Observations:
        data = honest(rng, n, accuracy=0.9)
        answer = np.where(data.named[:, 4] & (rng.random(n) < 0.12), 7, data.answer)
        return dataclasses.replace(data, answer=answer)

    rounds = []
    for _ in range(20):
        many = misread(20000)
        frequent = many.subset(many.named[:, 4] | (rng.random(20000) < 0.1))
        rounds.append(alarms(run_tests(frequent, misread(2400), range(C))))
    assert sum(rounds) <= 2


def null(k: np.ndarray, n: np.ndarray) -> statistics._Null:
    return statistics._Null(k, n, list(range(len(k))))


def test_rate_of_all_labels_weighs_most_where_only_chance_makes_them_differ():
    rng = np.random.default_rng(10)
    n = np.full(40, 80)
    most = [null(rng.binomial(n, 0.2), n).shrinkage == statistics.MAX_SHRINKAGE for _ in range(50)]
    assert np.mean(most) > 0.9


@pytest.mark.parametrize("images", [2, 8, 30])
def test_rate_of_all_labels_weighs_as_many_images_as_the_spread_of_the_rates_tells(images: int):
    rng = np.random.default_rng(11)
    n = rng.integers(50, 400, 2000)
    k = rng.binomial(n, rng.beta(0.25 * images, 0.75 * images, len(n)))
    assert null(k, n).shrinkage == pytest.approx(images, rel=0.15)


def test_rate_of_all_labels_weighs_least_where_each_is_always_or_never_wrong():
    n = np.full(C, 200)
    assert null(n * (np.arange(C) % 2), n).shrinkage == pytest.approx(1, abs=0.01)


def test_label_is_pulled_to_the_others_the_less_the_more_images_it_has():
    rates, pulls = np.linspace(0.05, 0.15, C), []
    rates[0] = 0.6
    for images in (5, 20, 80, 320):
        n = np.full(C, 200)
        n[0] = images
        of = null(np.rint(n * rates).astype(int), n)
        assert of.pooled < of.rate(0) < 0.6
        pulls.append((0.6 - of.rate(0)) / (0.6 - of.pooled))
    assert pulls == sorted(pulls, reverse=True)
    assert pulls[0] > 0.5 > 0.05 > pulls[-1]


def with_foreign(data: Observations, there: np.ndarray, named: np.ndarray) -> Observations:
    """And K images of what nobody asked about, which the model always answers with the same label.

    `there` (K, C) bool is what the oracle sees in them all the same, `named` (K, C) bool what captions say.
    """
    return Observations(
        np.append(data.answer, np.full(len(there), 3)),
        np.concatenate([data.seen, there]),
        np.concatenate([data.clear, there]),
        np.append(data.image, len(data.answer) + np.arange(len(there))),
        np.concatenate([data.named, named]),
    )


@pytest.mark.parametrize("seen", ["a label", "none"])
def test_images_of_which_no_caption_names_a_label_change_no_finding(seen: str):
    rng = np.random.default_rng(12)
    training, reference = honest(rng, 4000), honest(rng, 600)
    there = np.eye(C, dtype=bool)[rng.integers(0, C, 3000)] & (seen == "a label")
    findings = run_tests(with_foreign(training, there, np.zeros_like(there)), reference, range(C))
    assert not alarms(findings)
    assert findings == run_tests(training, reference, range(C))


def test_images_in_which_no_label_is_seen_are_no_answers_though_captions_name_one():
    rng = np.random.default_rng(13)
    training, reference = honest(rng, 4000), honest(rng, 600)
    named = np.eye(C, dtype=bool)[rng.integers(0, C, 3000)]
    findings = run_tests(with_foreign(training, np.zeros_like(named), named), reference, range(C))
    assert not alarms(findings)
    for c, test in run_tests(training, reference, range(C)).model.items():
        assert (findings.model[c].n, findings.model[c].k, findings.model[c].p) == (test.n, test.k, test.p)
