import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roclip.pool import CaptionPool


def unit(rows: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("backend", ["faiss", "torch"])
@pytest.mark.parametrize("rows", [1, 7, 100, 130])
@pytest.mark.parametrize("k", [1, 3])
def test_search_matches_exhaustive_search(backend, rows, k):
    pool = CaptionPool(100, 16, backend=backend)
    captions = unit(rows)
    pool.enqueue(captions, torch.arange(rows))
    queries = unit(33, seed=1)
    similarity, slots = pool.search(queries, k)
    scores = queries.numpy() @ pool.features[: pool.count].numpy().T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, pool.count)]
    assert np.array_equal(slots.numpy(), expected)
    assert np.allclose(similarity.numpy(), np.take_along_axis(scores, expected, 1), atol=1e-6)


def test_torch_search_in_pieces_matches_one_piece(monkeypatch):
    pool = CaptionPool(100, 16, backend="torch")
    pool.enqueue(unit(100), torch.arange(100))
    whole = pool.search(unit(9, seed=2), 3)
    monkeypatch.setattr(CaptionPool, "PIECE", 7)
    similarity, slots = pool.search(unit(9, seed=2), 3)
    assert torch.allclose(similarity, whole[0], atol=1e-6)
    assert torch.equal(slots, whole[1])


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (10, 23), (1, 3), (7, 7), (5, 1)])
def test_ring_keeps_the_newest_when_it_wraps(size, batch):
    pool = CaptionPool(size, 4)
    ids = torch.arange(5 * batch)
    features = unit(5 * batch, 4)
    for start in range(0, 5 * batch, batch):
        pool.enqueue(features[start : start + batch], ids[start : start + batch])
    newest = set(range(5 * batch))
    newest = set(sorted(newest)[-size:])
    assert set(pool.ids[: pool.count].tolist()) == newest
    for slot in range(pool.count):
        assert torch.equal(pool.features[slot], features[pool.ids[slot]])


def test_search_never_returns_an_empty_slot_when_all_similarities_are_negative():
    pool = CaptionPool(50, 4)
    captions = -F.normalize(torch.ones(3, 4) + 0.1 * torch.rand(3, 4), dim=-1)
    pool.enqueue(captions, torch.arange(3))
    similarity, slots = pool.search(F.normalize(torch.ones(2, 4), dim=-1), 10)
    assert slots.shape == (2, 3)
    assert int(slots.max()) < 3
    assert float(similarity.max()) < 0


def test_search_refuses_an_empty_pool():
    with pytest.raises(LookupError, match="empty"):
        CaptionPool(4, 4).search(unit(1, 4))


def test_state_round_trips_and_refuses_another_size():
    pool, other = CaptionPool(10, 4), CaptionPool(10, 4)
    pool.enqueue(unit(13, 4), torch.arange(13))
    other.load_state_dict(pool.state_dict())
    assert other.checksum() == pool.checksum()
    other.enqueue(unit(1, 4), torch.tensor([99]))
    assert other.checksum() != pool.checksum()
    with pytest.raises(ValueError, match=r"pool\.size"):
        CaptionPool(11, 4).load_state_dict(pool.state_dict())


def test_agreement_is_the_share_of_the_pool_that_is_not_nearer(monkeypatch):
    monkeypatch.setattr(CaptionPool, "PIECE", 7)
    pool = CaptionPool(20, 8)
    pool.enqueue(unit(20, 8), torch.arange(20))
    images, texts = unit(5, 8, seed=1), unit(5, 8, seed=2)
    for row, value in enumerate(pool.agreement(images, texts)):
        nearer = sum(float(images[row] @ caption) > float(images[row] @ texts[row]) for caption in unit(20, 8))
        assert float(value) == pytest.approx(1 - nearer / 20)
    assert torch.equal(pool.agreement(texts, texts), torch.ones(5))
