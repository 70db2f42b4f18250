"""Run on each rank from test_pool_ranks.py: the same work on the pool on any number of ranks, answers saved."""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from roclip import distributed
from roclip.defence.diagnostics import diagnostics
from roclip.defence.pool import CaptionPool

TOTAL, WIDTH = 24, 16
POISONS = {sample: "odd" if sample % 2 else "even" for sample in range(0, 3 * TOTAL, 5)}
CASES = list(itertools.product((1, 10, 37, 60), ("fp32", "fp16")))


def captions(step: int) -> torch.Tensor:
    """(TOTAL, WIDTH), of which a third repeats captions of all steps, so that the nearest ones tie across ranks."""
    features = torch.randn(TOTAL, WIDTH, generator=torch.Generator().manual_seed(step))
    features[::3] = torch.randn(TOTAL // 3, WIDTH, generator=torch.Generator().manual_seed(100))
    return F.normalize(features, dim=1)


def queries() -> torch.Tensor:
    return torch.cat([captions(2)[: TOTAL // 2], captions(9)[TOTAL // 2 :]])


def solve(size: int, storage: str, shard_above: int) -> dict:
    """What the pool answers after each of four steps, for the global batch."""
    rows = TOTAL // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    settings = {"backend": "torch", "storage": storage, "shard_above": shard_above, "context_length": 2}
    pool = CaptionPool(size, WIDTH, **settings)
    answers = {}
    for step in range(4):
        ids = torch.arange(TOTAL) + TOTAL * (step % 3)
        texts = captions(step)
        pool.enqueue(texts[mine], ids[mine], torch.stack([ids, ids + 1], 1)[mine], step)
        found = pool.nearest(queries()[mine])  # size 1 leaves shards empty
        similarity, slots = pool.search(queries()[mine], 5, torch.arange(TOTAL)[mine])
        answers[f"{step} features"] = distributed.gather(found.features)
        answers[f"{step} similarity"] = distributed.gather(torch.cat([found.similarity[:, None], similarity], 1))
        answers[f"{step} slots"] = distributed.gather(torch.cat([found.slots[:, None], slots], 1))
        answers[f"{step} ids"] = distributed.gather(pool.ids[found.slots])
        answers[f"{step} agreement"] = distributed.gather(pool.agreement(queries()[mine], texts[mine]))
        answers[f"{step} diagnostics"] = diagnostics(pool, found, ids[mine], step, poisons=POISONS)
        answers[f"{step} checksum"] = pool.checksum()
    answers["state"] = pool.state_dict()
    other = CaptionPool(size, WIDTH, **{**settings, "shard_above": 0 if shard_above else 1 << 20})
    other.load_state_dict(distributed.broadcast_object(answers["state"]))
    answers["reloaded"] = other.checksum()
    return answers


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder, world_size = Path(sys.argv[1]), dist.get_world_size()
    for size, storage in CASES:
        for shard_above in (0, 1 << 20):
            answer = solve(size, storage, shard_above)
            torch.save(answer, folder / f"{size}-{storage}-{shard_above}-{distributed.rank()}.pt")
    dist.destroy_process_group()
