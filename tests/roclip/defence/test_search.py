from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roclip.defence import search

BACKENDS = pytest.mark.parametrize("backend", ["faiss", "torch"])
STORAGE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])


def unit(rows: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return search.snap(F.normalize(torch.randn(rows, width, generator=generator), dim=1))


def stored(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return features.to(dtype) + 0.0


def reference(queries, captions, k, query_ids=None, caption_ids=None):
    """Exhaustive search in numpy: exact scores (N, P), then a stable sort."""
    scores = queries.double().numpy() @ captions.double().numpy().T
    if query_ids is not None:
        scores[query_ids.numpy()[:, None] == caption_ids.numpy()] = -np.inf
    slots = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, slots, 1)
    return scores, np.where(np.isneginf(scores), -1, slots)


def check(found, expected):
    assert np.array_equal(found[0].numpy(), expected[0])
    assert np.array_equal(found[1].numpy(), expected[1])


def test_a_float64_product_of_snapped_features_is_exact_in_any_order():
    left, right = unit(1, 1024)[0].double(), unit(1, 1024, seed=1)[0].double()
    exact = sum(Fraction(a) * Fraction(b) for a, b in zip(left.tolist(), right.tolist(), strict=True))
    for seed in range(20):
        order = torch.randperm(1024, generator=torch.Generator().manual_seed(seed))
        assert Fraction(float(left[order] @ right[order])) == exact
        assert Fraction(float(np.cumsum((left * right)[order].numpy())[-1])) == exact


def test_snap_moves_features_less_than_float32_can_tell_and_every_float16_is_snapped():
    features = F.normalize(torch.randn(100, 512, generator=torch.Generator().manual_seed(3)), dim=1)
    snapped = search.snap(features)
    assert float((snapped.double() - features.double()).abs().max()) <= 2.0**-26
    assert torch.equal(search.snap(snapped), snapped)
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    half = half[half.isfinite() & (half.abs() <= 1)]
    assert torch.equal(search.snap(half.float()), half.float())
    assert not torch.signbit(search.snap(torch.tensor([-0.0, -1e-20]))).any()


@BACKENDS
@STORAGE
@pytest.mark.parametrize("captions", [1, 7, 40, 300])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_search_matches_exhaustive_numpy_bit_for_bit(backend, dtype, captions, k, monkeypatch):
    monkeypatch.setattr(search, "PIECE", 64)
    monkeypatch.setattr(search, "ROWS", 10)
    pool, queries = stored(unit(captions), dtype), unit(33, seed=1)
    check(search.nearest(queries, pool, k, backend=backend), reference(queries, pool, k))


@BACKENDS
@STORAGE
@pytest.mark.parametrize("different", [1, 3, 20])
def test_lowest_slots_win_among_more_equal_captions_than_candidates(backend, dtype, different, monkeypatch):
    monkeypatch.setattr(search, "PIECE", 50)
    pool = stored(unit(different), dtype)[torch.randperm(400, generator=torch.Generator().manual_seed(1)) % different]
    queries = torch.cat([unit(40, seed=1), unit(different)])
    for k in (1, 5):
        check(search.nearest(queries, pool, k, backend=backend), reference(queries, pool, k))


@BACKENDS
def test_captions_that_differ_by_less_than_float32_resolves_are_told_apart(backend):
    centre = unit(1, 512)
    pool = search.snap(centre + 2.0**-25 * torch.randint(-1, 2, (300, 512), generator=torch.Generator().manual_seed(2)))
    queries = unit(20, 512, seed=1)
    expected = reference(queries, pool, 1)
    rounded = (queries @ pool.T).max(dim=1).indices
    assert not np.array_equal(rounded.numpy(), expected[1][:, 0])  # float32 alone does get this wrong
    check(search.nearest(queries, pool, 1, backend=backend), expected)


@BACKENDS
def test_answers_do_not_depend_on_how_the_batch_is_split(backend):
    pool = unit(200, 256)[torch.arange(700) % 200]
    queries = unit(48, 256, seed=1)
    whole = search.nearest(queries, pool, 2, backend=backend)
    for rows in (1, 5, 24):
        parts = [search.nearest(part, pool, 2, backend=backend) for part in queries.split(rows)]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
    part = torch.cat([search.count_above(part, pool, torch.zeros(len(part)).double()) for part in queries.split(7)])
    assert torch.equal(part, search.count_above(queries, pool, torch.zeros(48).double()))


@BACKENDS
def test_captions_of_the_own_sample_are_not_found(backend, monkeypatch):
    monkeypatch.setattr(search, "PIECE", 50)
    queries, ids = unit(10, seed=1), torch.arange(10)
    pool, owners = torch.cat([queries.repeat(20, 1), unit(100)]), torch.cat([ids.repeat(20), 100 + torch.arange(100)])
    for k in (1, 4):
        found = search.nearest(queries, pool, k, backend=backend, query_ids=ids, caption_ids=owners)
        check(found, reference(queries, pool, k, ids, owners))
    own = search.nearest(queries[:1], pool[:1], 1, backend=backend, query_ids=ids[:1], caption_ids=owners[:1])
    assert own[0].tolist() == [[-np.inf]]
    assert own[1].tolist() == [[-1]]


@BACKENDS
def test_candidates_are_within_the_bound(backend):
    pool, queries = unit(500, 1024), unit(30, 1024, seed=1)
    rough, slots = search._candidates(queries, pool, 20, backend)
    error = (rough.double() - (queries.double() @ pool.double().T).gather(1, slots)).abs().max()
    assert float(error) < search._bound(pool)


def test_mixed_precision_around_the_search_does_not_reach_it():
    pool, queries = unit(100, 64), unit(10, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = search.nearest(queries, pool, 1, backend="torch")
    check(found, reference(queries, pool, 1))


def test_the_faster_backend_is_chosen_without_touching_the_random_state():
    before = torch.get_rng_state()
    assert search.fastest(100, 16, 8, torch.device("cpu"), torch.float32) in ("faiss", "torch")
    assert search.fastest(1, 1, 1, torch.device("cpu"), torch.float16) in ("faiss", "torch")
    assert torch.equal(torch.get_rng_state(), before)
