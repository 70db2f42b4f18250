"""Exact nearest-neighbour search: the k largest inner products, with the same bits for any split, device and backend.

The order of a float32 sum changes its last bits, and BLAS picks the order from the shapes. So a batch that is split over another
number of ranks would find other neighbours wherever scores nearly tie, as they do among repeated captions. Hence two steps:

1. `snap` rounds features to multiples of 2^-25. Products of such numbers are multiples of 2^-50, and no partial sum of
   an inner product reaches 8 where |q| |c| < 8 (Cauchy-Schwarz), so float64 represents them all: a float64 inner product of
   snapped vectors is exact, whatever the order. That is the score; ties go to the lowest slot.
2. A backend finds more than k candidates in float32, whose error is at most `_bound`. The exact scores of those that this error
   could lift among the k are computed. If the last candidate is more than the bound below the k-th best, no other caption can
   belong to the k. A query without that guarantee (many equal captions) is searched again in float64.

No B x P matrix and no copy of the ring is made: both sides are processed in pieces.
Letters: B local batch, D feature width, P pool size, k captions found.
"""

import time
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from roclip.distributed import broadcast_object, rank

Backend = Literal["faiss", "torch"]
PIECE = 4096
"""Captions at a time; with ROWS, a piece of scores takes 16 MiB in float32."""
ROWS = 1024
"""Queries at a time."""
GPU_SCORES = 2**24
"""Scores at a time on a GPU (64 MiB), which sets the number of captions: 256 queries among 1,048,576 captions took an H100 83 ms
with 4,096 captions at a time, and 13 ms with 65,536."""
SPARE = 31
"""Candidates beyond k. They cost a few percent, and suffice for up to so many nearly equal captions."""
_GRID = 2.0**25
_INF = float("inf")


def snap(features: Tensor) -> Tensor:
    """Float32 features rounded to multiples of 2^-25 (an error of at most 1.5e-8), with no negative zero."""
    return torch.round(features.float() * _GRID) / _GRID + 0.0


def nearest(
    queries: Tensor,
    captions: Tensor,
    k: int,
    *,
    backend: Backend = "torch",
    query_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k captions with the largest inner product for each query, best first, ties to the lowest number.

    Args:
        queries: (B, D) float32, unit length, snapped.
        captions: (P, D) float32 or float16 on the same device, unit length, snapped.
        query_ids, caption_ids: (B,) and (P,); given, a caption with the id of a query is excluded for that query.

    Returns:
        Exact scores (B, min(k, P)) float64 and numbers of the captions, int64; -inf and -1 where fewer are found.
    """
    if not len(captions):
        none = queries.new_empty(len(queries), 0)
        return none.double(), none.long()
    wanted = min(k + SPARE, len(captions))
    k = min(k, len(captions))
    rough, numbers = _candidates(queries, captions, wanted, backend)
    last = rough.amin(dim=1).double()
    if query_ids is not None and caption_ids is not None:
        rough = rough.masked_fill(caption_ids[numbers] == query_ids[:, None], -_INF)
    scores, bound = torch.full_like(rough, -_INF, dtype=torch.float64), _bound(captions)
    within = (rough >= rough.topk(k).values[:, -1:] - 2 * bound) & (rough > -_INF)
    rows, columns = within.nonzero(as_tuple=True)
    scores[rows, columns] = _exact(queries, captions, rows, numbers[rows, columns])
    scores, numbers = best_first(scores, numbers, k)
    if wanted < len(captions):
        unproven = (last + bound >= scores[:, -1]).nonzero().squeeze(1)
        if len(unproven):
            ids = None if query_ids is None else query_ids[unproven]
            scores[unproven], numbers[unproven] = exhaustive(queries[unproven], captions, k, ids, caption_ids)
    return scores, numbers.masked_fill(scores == -_INF, -1)


def best_first(scores: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row with their numbers, ties to the lowest number."""
    numbers, order = numbers.sort(dim=1, stable=True)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], numbers.gather(1, order[:, :k])


def exhaustive(
    queries: Tensor, captions: Tensor, k: int, query_ids: Tensor | None = None, caption_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`nearest` from exact scores of all pairs; it takes two to three times as long on a CPU."""
    best = queries.new_full((len(queries), k), -_INF, dtype=torch.float64)
    numbers = torch.full_like(best, -1, dtype=torch.int64)
    for start in range(0, len(captions), PIECE):
        piece = captions[start : start + PIECE].double().T
        for row in range(0, len(queries), ROWS):
            rows = slice(row, row + ROWS)
            scores = queries[rows].double() @ piece
            if query_ids is not None and caption_ids is not None:
                scores.masked_fill_(query_ids[rows, None] == caption_ids[start : start + PIECE], -_INF)
            found, where = [best[rows]], [numbers[rows]]
            for _ in range(min(k, scores.shape[1])):
                value, column = scores.max(dim=1, keepdim=True)  # the first of equals
                scores.scatter_(1, column, -_INF)
                found.append(value)
                where.append(column + start)
            best[rows], numbers[rows] = best_first(torch.cat(found, 1), torch.cat(where, 1), k)
    return best, numbers


def count_above(queries: Tensor, captions: Tensor, least: Tensor) -> Tensor:
    """(B,) int64: the number of captions whose exact score with each query is larger than `least` (B,) float64."""
    above = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(captions), PIECE):
        piece = captions[start : start + PIECE].double().T
        for row in range(0, len(queries), ROWS):
            rows = slice(row, row + ROWS)
            above[rows] += (queries[rows].double() @ piece > least[rows, None]).sum(dim=1)
    return above


def fastest(size: int, width: int, batch: int, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that rank 0 measures as faster on a random search of this size, at most a slice of it; takes about 0.1 s."""
    chosen: Backend = "torch"
    if rank() == 0 and _has_faiss(device):
        generator = torch.Generator().manual_seed(0)
        limits = (128, 4 * PIECE) if device.type == "cpu" else (ROWS, 16 * PIECE)
        queries, captions = (
            torch.nn.functional.normalize(torch.randn(min(rows, limit), width, generator=generator), dim=1).to(device)
            for rows, limit in zip((batch, size), limits, strict=True)
        )
        captions = captions.to(dtype)
        rounds = [(_time(queries, captions, "faiss"), _time(queries, captions, "torch")) for _ in range(5)]
        faiss_s, torch_s = (min(times) for times in zip(*rounds[1:], strict=True))  # the first round warms up
        chosen = "faiss" if faiss_s <= torch_s else "torch"
    return broadcast_object(chosen)


def _time(queries: Tensor, captions: Tensor, backend: Backend) -> float:
    start = time.perf_counter()
    _candidates(queries, captions, min(1 + SPARE, len(captions)), backend)[0].sum().item()
    return time.perf_counter() - start


def _bound(captions: Tensor) -> float:
    """Largest error of a candidate's score for |q| |c| <= 2: D roundings, each of at most 2^-24 of the products' sum.

    On a GPU it includes the error of TensorFloat-32 inputs, 2^-10 of each factor, which a program may have enabled.
    """
    return captions.shape[1] * 2.0**-23 + (2.0**-8 if captions.is_cuda else 0.0)


def _candidates(queries: Tensor, captions: Tensor, wanted: int, backend: Backend) -> tuple[Tensor, Tensor]:
    """float32 scores and numbers, (B, wanted) each, of approximately the best captions of each query."""
    search = _faiss_search if backend == "faiss" else _torch_search
    whole = backend == "faiss" and captions.dtype == torch.float32  # FAISS makes its own pieces
    piece = len(captions) if whole else _piece(len(queries), captions.is_cuda)
    best = torch.empty(len(queries), wanted, device=queries.device)
    numbers = torch.empty(len(queries), wanted, dtype=torch.int64, device=queries.device)
    for row in range(0, len(queries), ROWS):
        rows = slice(row, row + ROWS)
        scores, found = best[rows, :0], numbers[rows, :0]
        for start in range(0, len(captions), piece):
            part = captions[start : start + piece].float()
            more, where = search(queries[rows], part, min(wanted, len(part)))
            scores, found = torch.cat([scores, more], 1), torch.cat([found, where + start], 1)
            scores, kept = scores.topk(min(wanted, scores.shape[1]))
            found = found.gather(1, kept)
        best[rows], numbers[rows] = scores, found
    return best, numbers


def _piece(queries: int, on_gpu: bool) -> int:
    return max(PIECE, GPU_SCORES // max(1, min(queries, ROWS))) if on_gpu else PIECE


def _exact(queries: Tensor, captions: Tensor, rows: Tensor, numbers: Tensor) -> Tensor:
    """(n,) float64: exact scores of n pairs of a query (row) and a caption (number)."""
    pairs = zip(rows.split(PIECE), numbers.split(PIECE), strict=True)
    return torch.cat([(queries[row].double() * captions[number].double()).sum(dim=1) for row, number in pairs])


def _torch_search(queries: Tensor, captions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ captions.T
    return torch.topk(scores, k)


def _faiss_search(queries: Tensor, captions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    import faiss

    product = faiss.METRIC_INNER_PRODUCT
    if not captions.is_cuda:
        scores, found = faiss.knn(queries.numpy(), captions.numpy(), k, metric=product)
        return torch.from_numpy(scores), torch.from_numpy(found)
    import faiss.contrib.torch_utils  # knn_gpu takes tensors after this, and runs on torch's current stream

    index = captions.device.index
    with torch.cuda.device(index):
        return faiss.knn_gpu(
            _gpu_resources(index), queries.contiguous(), captions.contiguous(), k, metric=product, device=index
        )


@cache
def _gpu_resources(index: int) -> Any:
    """FAISS's buffers on GPU `index`."""
    import faiss

    resources = faiss.StandardGpuResources()
    resources.setTempMemory(256 * 2**20)  # FAISS would take 1.5 GiB
    return resources


def _has_faiss(device: torch.device) -> bool:
    try:
        import faiss
    except ImportError:
        return False
    return device.type == "cpu" or (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0)
