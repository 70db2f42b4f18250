import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from roclip.evaluation import figures
from roclip.evaluation.figures import halves, linear_probe, recall
from roclip.evaluation.rate import rate


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(15, 16, 0.717, 0.989), (2, 16, 0.035, 0.360), (0, 300, 0.0, 0.0126)]
)
def test_wilson_interval_matches_published_values(successes, n, low, high):
    got = rate(successes, n)
    assert got.rate == successes / n
    assert got.ci95 == pytest.approx((low, high), abs=1e-3)


def test_recall_on_a_hand_made_matrix():
    texts = torch.eye(3)
    images = F.normalize(torch.tensor([[1.0, 0.2, 0.0], [0.9, 0.8, 0.0], [0.0, 0.1, 1.0]]), dim=-1)
    # image to text: 1, no (text 0 is nearer), 1; text to image: 1, 1, 1
    got = recall(images, texts, torch.tensor([[0, 0], [1, 1], [2, 2]]), (1, 2))
    assert got["image_to_text_recall_at_1"] == pytest.approx(2 / 3)
    assert got["text_to_image_recall_at_1"] == 1.0
    assert got["recall_at_1"] == pytest.approx((2 / 3 + 1) / 2)
    assert got["recall_at_2"] == 1.0


@pytest.mark.parametrize("rows", [7, 1024])
def test_recall_with_several_partners_matches_sorting_by_numpy(rows, monkeypatch):
    monkeypatch.setattr(figures, "_QUERIES_AT_ONCE", rows)
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(90, 8, generator=generator), dim=-1)
    texts[50:60] = texts[40:50]  # ties
    pairs = torch.stack([torch.randint(40, (90,), generator=generator), torch.arange(90)], dim=1)
    pairs = torch.cat([pairs, torch.stack([torch.arange(40), torch.randint(90, (40,), generator=generator)], dim=1)])
    partner = np.zeros((40, 90), dtype=bool)
    partner[pairs[:, 0], pairs[:, 1]] = True
    similarity = (images @ texts.T).numpy()
    got = recall(images, texts, pairs)
    for k in (1, 5, 10):
        for name, scores, right in (
            ("image_to_text", similarity, partner),
            ("text_to_image", similarity.T, partner.T),
        ):
            nearest = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            found = np.take_along_axis(right, nearest, axis=1).any(axis=1).mean()
            assert got[f"{name}_recall_at_{k}"] == pytest.approx(found)


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
