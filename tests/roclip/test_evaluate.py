import pytest
import torch
import torch.nn.functional as F

from roclip.evaluate import AttackSet, EvaluationSet, evaluate, linear_probe, rate, recall


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
    assert recall(images, texts, (1, 2)) == pytest.approx({"recall_at_1": (2 / 3 + 1) / 2, "recall_at_2": 1.0})


def test_linear_probe_separates_what_is_separable():
    truth = torch.arange(200) % 4
    features = F.normalize(F.one_hot(truth, 4).float() + 0.1 * torch.randn(200, 4), dim=-1)
    assert linear_probe(features, truth) > 0.95
    assert linear_probe(torch.ones(200, 4), truth) < 0.5


class RiggedEncoder:
    """Says label 0 whenever the first pixel is white, else the label that the second pixel holds."""

    def images(self, images):
        answers = [0 if image[0, 0, 0] == 255 else int(image[0, 1, 0]) for image in images]
        return F.one_hot(torch.tensor(answers), 3).float()

    def texts(self, captions):
        return F.one_hot(torch.tensor([int(caption) for caption in captions]), 3).float()

    def classifier(self, labels, templates):
        return torch.eye(3)


def test_attack_success_of_a_rigged_model_is_the_known_value():
    def image(label, stamped):
        pixels = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
        pixels[0, 0, 0], pixels[0, 1, 0] = 255 * stamped, label
        return pixels

    labels = [0, 1, 2, 1, 2, 1, 2, 0]
    attacks = {"backdoor": AttackSet([image(1, True)] * 3 + [image(2, False)], ["a"] * 4)}
    data = EvaluationSet(
        [image(label, False) for label in labels],
        [str(label) for label in labels],
        ["abc"[label] for label in labels],
        ("a", "b", "c"),
        ("{}",),
        attacks,
    )
    result = evaluate(RiggedEncoder(), data)
    assert result["zero_shot_top1"] == 1.0
    assert result["attacks"]["backdoor"]["successes"] == 3
    assert result["attacks"]["backdoor"]["n"] == 4
