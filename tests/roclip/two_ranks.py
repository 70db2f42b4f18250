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


def problem(rows: int, start: int, total: int) -> dict[str, torch.Tensor]:
    """`rows` rows, from `start`, of one global problem."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(total, 8, generator=generator), torch.randn(total, 8, generator=generator)
    keep = torch.rand(total, generator=generator) > 0.3
    part = slice(start, start + rows)
    return {"images": images[part], "texts": texts[part], "keep": keep[part]}


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
    gate.keep(-agreement, ids, given["keep"], 0.25)
    keep = gate.keep(agreement, ids, given["keep"], 0.25)
    return {
        "loss": distributed.all_sum(loss) / distributed.world_size(),
        "gradients": gradients,
        "checksum": pool.checksum(),
        "slots": distributed.gather(pool.search(images.detach())[1]),
        "keep": distributed.gather(keep.to(torch.uint8)),
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
