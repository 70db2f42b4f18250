"""Metrics of a matched step: is the pool large, fresh and diverse enough, and does it defend?

Letters: B local batch, G global batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from roclip.defence.pool import CaptionPool, Match
from roclip.distributed import gather


def diagnostics(
    pool: CaptionPool,
    match: Match,
    ids: Tensor,
    step: int,
    *,
    valid: Tensor | None = None,
    poisons: Mapping[int, str] | None = None,
) -> dict[str, float]:
    """The pool's metrics of one step, over the valid pairs of the global batch. Every rank must call it; all get the
    same values.

    Args:
        match: What `pool.nearest` returned, before this step's captions were enqueued.
        ids: (B,) int64 sample ids of the images.
        step: Optimizer steps done, as passed to `enqueue`.
        valid: (B,) bool; all by default.
        poisons: Ground truth by sample id, for metrics only: the attacker's aim, such as attack and target label.
            `poisons_met` counts the poisoned images whose nearest caption is that of a poison with the same aim.

    Returns:
        Values by name (`roclip.metrics.registry.METRICS`); empty where no pair is valid.
    """
    similarity, slots, ids = gather(match.similarity), gather(match.slots), gather(ids.to(match.slots.device))
    if valid is not None:
        kept = gather(valid.to(slots.device, torch.uint8)).bool()
        similarity, slots, ids = similarity[kept], slots[kept], ids[kept]
    if not len(slots):
        return {}
    similarity, slots, ids = similarity.double().cpu(), slots.to(pool.ids.device), ids.cpu()
    found, enqueued = pool.ids[slots].cpu(), pool.steps[slots].cpu()
    counts = torch.unique(slots, return_counts=True)[1].cpu()
    share = counts.double() / len(slots)
    p10, p50, p90 = similarity.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    values = {
        "pool_similarity": float(similarity.mean()),
        "pool_similarity_p10": p10,
        "pool_similarity_p50": p50,
        "pool_similarity_p90": p90,
        "pool_own": float((found == ids).double().mean()),
        "pool_duplicates": 1 - len(counts) / len(slots),
        "pool_staleness": float((step - enqueued).double().mean()),
        "pool_entropy": float(-(share * share.log()).sum()),
    }
    if poisons is not None:
        pairs = [
            (poisons[a], poisons.get(b)) for a, b in zip(ids.tolist(), found.tolist(), strict=True) if a in poisons
        ]
        values |= {"poisons_seen": float(len(pairs)), "poisons_met": float(sum(aim == other for aim, other in pairs))}
    return values
