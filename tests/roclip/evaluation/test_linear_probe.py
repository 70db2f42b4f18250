import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from roclip.evaluation.linear_probe import halves, linear_probe


def test_copies_of_an_image_lie_in_one_half_and_order_does_not_matter():
    digests = [str(i % 30) for i in range(100)]
    train, test = halves(digests)
    assert not {digests[i] for i in train} & {digests[i] for i in test}
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert len({digests[i] for i in train}) == 15
    order = np.random.default_rng(0).permutation(100)
    moved, _ = halves([digests[i] for i in order])
    assert {digests[order[i]] for i in moved} == {digests[i] for i in train}


def test_features_that_tell_only_the_image_apart_tell_nothing_of_unseen_images():
    """Every image four times: with copies in both halves the probe would know all of them."""
    generator = torch.Generator().manual_seed(0)
    digests = [str(i // 4) for i in range(800)]
    features = F.normalize(torch.randn(200, 256, generator=generator), dim=-1).repeat_interleave(4, dim=0)
    truth = torch.randint(4, (200,), generator=generator).repeat_interleave(4)
    assert linear_probe(features, truth, digests) < 0.4


def test_linear_probe_matches_a_regression_solved_by_scipy():
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(240) % 3
    features = F.normalize(F.one_hot(truth, 6) + 0.9 * torch.randn(240, 6, generator=generator), dim=-1)
    digests = [f"{i:03d}" for i in range(240)]
    train, test = (rows.numpy() for rows in halves(digests))
    x, y = features.numpy().astype(float) * 10, truth.numpy()

    def scores(flat, rows):
        return x[rows] @ flat[:18].reshape(6, 3) + flat[18:]

    def loss(flat):
        logits = scores(flat, train)
        logits = logits - logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(train)), y[train]]
        return (np.log(np.exp(logits).sum(axis=1)) - chosen).mean() + 1e-3 * (flat[:18] ** 2).sum()

    best = minimize(loss, np.zeros(21)).x
    assert linear_probe(features, truth, digests) == pytest.approx((scores(best, test).argmax(1) == y[test]).mean())


def test_one_image_alone_cannot_be_probed():
    assert linear_probe(torch.eye(3), torch.tensor([0, 1, 2]), ["a", "a", "a"]) is None
