import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roclip.defence import search
from roclip.defence.pool import CaptionPool
from roclip.errors import CheckpointError

STORAGE = pytest.mark.parametrize("storage", ["fp32", "fp16"])


def unit(rows: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(size: int, rows: int, width: int = 16, **settings) -> CaptionPool:
    pool = CaptionPool(size, width, backend="torch", **settings)
    pool.enqueue(unit(rows, width), torch.arange(rows))
    return pool


@STORAGE
@pytest.mark.parametrize("rows", [1, 7, 100, 130])
@pytest.mark.parametrize("k", [1, 3])
def test_search_matches_exhaustive_numpy_bit_for_bit(storage, rows, k):
    pool, queries = filled(100, rows, storage=storage), unit(33, seed=1)
    similarity, slots = pool.search(queries, k)
    scores = search.snap(queries).double().numpy() @ pool.features[: pool.count].double().numpy().T
    expected = np.argsort(-scores, axis=1, kind="stable")[:, : min(k, pool.count)]
    assert np.array_equal(slots.numpy(), expected)
    assert np.array_equal(similarity.numpy(), np.take_along_axis(scores, expected, 1).astype(np.float32))


@STORAGE
def test_stored_features_are_the_captions_to_their_precision(storage):
    pool = filled(10, 10, storage=storage)
    assert torch.allclose(pool.features.float(), unit(10), atol=2.0**-25 if storage == "fp32" else 2.0**-11, rtol=0)
    found = pool.nearest(unit(3, seed=1))
    assert found.features.dtype == torch.float32
    assert torch.equal(found.features, pool.features[found.slots].float())


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (10, 23), (1, 3), (7, 7), (5, 1)])
def test_ring_keeps_the_newest_when_it_wraps(size, batch):
    pool = CaptionPool(size, 4, context_length=2)
    ids = torch.arange(5 * batch)
    features = unit(5 * batch, 4)
    for step, start in enumerate(range(0, 5 * batch, batch)):
        part = slice(start, start + batch)
        pool.enqueue(features[part], ids[part], torch.stack([ids[part], -ids[part]], 1), step)
    assert set(pool.ids[: pool.count].tolist()) == set(range(5 * batch)[-size:])
    for slot in range(pool.count):
        sample = int(pool.ids[slot])
        assert torch.equal(pool.features[slot], search.snap(features[sample]))
        assert pool.tokens[slot].tolist() == [sample, -sample]
        assert int(pool.steps[slot]) == sample // batch


def test_captions_of_samples_that_could_not_be_read_do_not_enter():
    pool, ids = CaptionPool(5, 4), torch.arange(4)
    pool.enqueue(unit(4, 4), ids, valid=torch.tensor([True, False, False, True]))
    pool.enqueue(unit(4, 4), ids, valid=torch.zeros(4, dtype=torch.bool))
    assert (pool.count, pool.cursor) == (2, 2)
    assert pool.ids[:2].tolist() == [0, 3]
    assert torch.equal(pool.features[1], search.snap(unit(4, 4)[3]))


def test_search_never_returns_an_empty_slot_when_all_similarities_are_negative():
    pool = CaptionPool(50, 4)
    captions = -F.normalize(torch.ones(3, 4) + 0.1 * torch.rand(3, 4), dim=-1)
    pool.enqueue(captions, torch.arange(3))
    similarity, slots = pool.search(F.normalize(torch.ones(2, 4), dim=-1), 10)
    assert slots.shape == (2, 3)
    assert int(slots.max()) < 3
    assert float(similarity.max()) < 0


def test_own_caption_is_not_found_when_it_is_excluded():
    pool, images = filled(40, 30), unit(30)
    ids = torch.arange(30)
    assert torch.equal(pool.nearest(images).slots, ids)
    others = pool.nearest(images, ids)
    assert not (pool.ids[others.slots] == ids).any()
    assert torch.equal(others.slots, pool.search(images, 2)[1][:, 1])
    with pytest.raises(LookupError, match="own caption"):
        filled(4, 1).nearest(unit(1), torch.tensor([0]))


def test_empty_pool_is_refused():
    pool = CaptionPool(4, 4)
    with pytest.raises(LookupError, match="empty"):
        pool.search(unit(1, 4))
    with pytest.raises(LookupError, match="empty"):
        pool.agreement(unit(1, 4), unit(1, 4))


def test_tokens_are_asked_for_by_a_pool_that_keeps_them():
    with pytest.raises(ValueError, match="tokens"):
        CaptionPool(4, 4, context_length=3).enqueue(unit(2, 4), torch.arange(2))


@STORAGE
def test_state_round_trips_and_refuses_another_shape(storage):
    settings = {"storage": storage, "context_length": 3}
    pool, other = CaptionPool(10, 4, **settings), CaptionPool(10, 4, **settings)
    tokens = torch.randint(0, 100, (13, 3))
    pool.enqueue(unit(13, 4), torch.arange(13), tokens, step=5)
    other.load_state_dict(pool.state_dict())
    assert other.checksum() == pool.checksum()
    assert torch.equal(other.tokens[other.ids - 3], pool.tokens[pool.ids - 3])
    assert torch.equal(other.steps, torch.full((10,), 5))
    other.enqueue(unit(1, 4), torch.tensor([99]), tokens[:1])
    assert other.checksum() != pool.checksum()
    with pytest.raises(CheckpointError, match=r"pool\.size"):
        CaptionPool(11, 4).load_state_dict(pool.state_dict())
    with pytest.raises(CheckpointError, match=r"pool\.text_gradient"):
        CaptionPool(10, 4, context_length=4).load_state_dict(pool.state_dict())


def test_checksum_tells_one_changed_bit_and_one_changed_place():
    sums = {filled(300, 300).checksum()}
    for change in ("bit", "place", "id", "step"):
        pool = filled(300, 300)
        if change == "bit":
            pool.features.view(torch.int32)[250, 3] ^= 1
        elif change == "place":
            pool.features[7] = pool.features[7].flip(0)
        elif change == "id":
            pool.ids[0] += 1
        else:
            pool.steps[0] += 1
        sums.add(pool.checksum())
    assert len(sums) == 5


@STORAGE
def test_agreement_is_the_share_of_the_pool_that_is_not_nearer(storage, monkeypatch):
    monkeypatch.setattr(search, "PIECE", 7)
    pool = filled(20, 20, 8, storage=storage)
    images, texts = unit(5, 8, seed=1), unit(5, 8, seed=2)
    stored = texts.half() if storage == "fp16" else search.snap(texts)
    for row, value in enumerate(pool.agreement(images, texts)):
        query = search.snap(images[row]).double()
        own = float(query @ stored[row].double())
        nearer = sum(float(query @ caption.double()) > own for caption in pool.features)
        assert float(value) == pytest.approx(1 - nearer / 20)
    assert torch.equal(pool.agreement(unit(20, 8), unit(20, 8)), torch.ones(20))  # its equal is not nearer
