"""Run by `torchrun` from test_distributed.py: what each rank computes is saved for the test to compare."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from roclip import distributed
from roclip.gate import AgreementGate
from roclip.loss import clip_loss
from roclip.pool import CaptionPool
from roclip.witnesses import Witnesses


def problem(rows: int, start: int, total: int) -> dict[str, torch.Tensor]:
    """`rows` rows, from `start`, of one global problem."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(total, 8, generator=generator), torch.randn(total, 8, generator=generator)
    keep = torch.rand(total, generator=generator) > 0.3
    thumbnails, tokens = torch.rand(total, 768, generator=generator), torch.randint(50, (total, 6), generator=generator)
    part = slice(start, start + rows)
    return {
        "thumbnails": thumbnails[part],
        "tokens": tokens[part],
        "images": images[part],
        "texts": texts[part],
        "keep": keep[part],
    }


def solve(rows: int, start: int, total: int) -> dict:
    """Loss, mean gradients, gate and pool of this rank's rows."""
    given = problem(rows, start, total)
    weight = torch.eye(8).requires_grad_()
    scale = torch.tensor([7.0], requires_grad=True)
    images = F.normalize(given["images"] @ weight, dim=-1)
    texts = F.normalize(given["texts"] @ weight, dim=-1)
    loss = clip_loss(images, texts, scale, given["keep"], torch.arange(start, start + rows) // 5)
    gradients = [distributed.all_sum(g) / distributed.world_size() for g in torch.autograd.grad(loss, (weight, scale))]
    pool = CaptionPool(20, 8)
    for _ in range(3):
        pool.enqueue(texts.detach(), torch.arange(start, start + rows))
    agreement = pool.agreement(images, texts)
    gate = AgreementGate(0.5)
    ids = torch.arange(start, start + rows)
    gate.suspects([-agreement], ids, given["keep"], 0.25)
    suspected = gate.suspects([agreement, images[:, 0]], ids, given["keep"], 0.25)
    witnesses = Witnesses(20, 8, 6, 50, neighbours=3, seed=0)
    thumbnails, tokens = given["thumbnails"], given["tokens"]
    witnesses.fit(thumbnails, tokens)
    witnesses.enqueue(thumbnails, images, tokens, ids, given["keep"])
    heard = [witnesses.by_look(thumbnails, tokens, ids), witnesses.by_feature(images, tokens, ids)]
    return {
        "loss": distributed.all_sum(loss) / distributed.world_size(),
        "gradients": gradients,
        "checksum": pool.checksum(),
        "slots": distributed.gather(pool.search(images.detach())[1]),
        "suspected": distributed.gather(suspected.to(torch.uint8)),
        "testimony": torch.cat([distributed.gather(part.double()) for found in heard for part in found]),
        "scores": gate.state_dict()["scores"],
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    total = 24
    rows = total // world_size
    answer = solve(rows, distributed.rank() * rows, total)
    torch.save(answer, Path(sys.argv[1]) / f"{world_size}-{distributed.rank()}.pt")
    dist.destroy_process_group()
