import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roclip.evaluation import retrieval
from roclip.evaluation.retrieval import recall


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
    monkeypatch.setattr(retrieval, "_ROWS", rows)
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
