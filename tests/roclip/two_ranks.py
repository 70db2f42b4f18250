"""Run on each rank from test_distributed.py: what each rank computes is saved for the test to compare."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from roclip import distributed
from roclip.defence.neighbours import Neighbours
from roclip.defence.pool import CaptionPool
from roclip.defence.sample_filter import SampleFilter
from roclip.defence.suspicion_model import SuspicionModel
from roclip.training.losses import clip_loss


def problem(rows: int, start: int, total: int) -> dict[str, torch.Tensor]:
    """`rows` rows, from `start`, of one global problem."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(total, 8, generator=generator), torch.randn(total, 8, generator=generator)
    keep = torch.rand(total, generator=generator) > 0.3
    raw, tokens = (
        torch.rand(total, 1056, generator=generator),
        torch.randint(50, (total, 6), generator=generator),
    )
    pixels = torch.randint(0, 256, (total, 3, 16, 16), generator=generator, dtype=torch.uint8)
    part = slice(start, start + rows)
    return {
        "pixels": pixels[part],
        "raw": raw[part],
        "tokens": tokens[part],
        "images": images[part],
        "texts": texts[part],
        "keep": keep[part],
    }


def solve(rows: int, start: int, total: int) -> dict:
    """Loss, mean gradients, sample filter and pool of this rank's rows."""
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
    sample_filter = SampleFilter(0.5, SuspicionModel(16))
    ids, pixels = torch.arange(start, start + rows), given["pixels"]
    sample_filter.suspects([-agreement], ids, given["keep"], pixels, 0.25)
    suspected = sample_filter.suspects([agreement, images[:, 0]], ids, given["keep"], pixels, 0.25)
    neighbours = Neighbours(20, 8, 6, 50, neighbours=3, seed=0)
    raw, tokens = given["raw"], given["tokens"]
    neighbours.fit(raw, tokens)
    neighbours.enqueue(raw, images, texts, tokens, ids, given["keep"])
    told = []
    for support in (neighbours.by_descriptor(raw, ids), neighbours.by_image_feature(images, ids)):
        told += [
            support.slots,
            support.usable.long(),
            neighbours.representative(support),
            neighbours.bag_of_words_agreement(support, tokens),
        ]
        told.append(neighbours.text_agreement(support, texts))
    return {
        "loss": distributed.all_sum(loss) / distributed.world_size(),
        "gradients": gradients,
        "checksum": pool.checksum(),
        "slots": distributed.gather(pool.search(images.detach())[1]),
        "suspected": distributed.gather(suspected.to(torch.uint8)),
        "neighbours": torch.cat([distributed.gather(part.double()).flatten() for part in told]),
        "scores": sample_filter.state_dict()["scores"],
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    world_size = dist.get_world_size()
    total = 24
    rows = total // world_size
    answer = solve(rows, distributed.rank() * rows, total)
    torch.save(answer, Path(sys.argv[1]) / f"{world_size}-{distributed.rank()}.pt")
    dist.destroy_process_group()
