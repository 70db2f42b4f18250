"""Times of the pool and of the loss for `scale.py`: one rank's part, by pool, batch and world. Each is a median of a few runs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scale_device import Device, fake_world, say, unit

from roclip import distributed
from roclip.config import parse_config
from roclip.config.schedule import Position
from roclip.data.stream import Batch
from roclip.defence import search
from roclip.defence.defence import Defence
from roclip.defence.image_descriptor import raw_descriptors
from roclip.defence.pool import CaptionPool
from roclip.model.towers import Towers
from roclip.training.losses import clip_loss

LONGEST_S = 1.5
"""One call that would take longer is not measured."""
SIDE_PX = 256


def searches(device: Device, width: int, sizes: Sequence[int], queries: Sequence[int]) -> dict:
    """Seconds of `CaptionPool.nearest` on the torch backend, by P and local B; in float32, and where the ring is halved."""
    rows = []
    for storage, asked_at_once in (("fp32", queries), ("fp16", queries[:2])):
        for size in sizes:
            pool = _full_pool(device, size, width, storage)
            rate = 0.0
            for batch in asked_at_once:
                if rate * batch > LONGEST_S:
                    continue
                row = {"D": width, "P": size, "B": batch, "storage": storage, "piece": search.PIECE}
                asked = unit(batch, width, device)
                with device.peak(row):
                    row["search_s"] = device.median_s(lambda pool=pool, asked=asked: pool.nearest(asked))
                rate = row["search_s"] / batch
                rows.append(say(row))
            del pool
    return {"searches": rows}


def larger_pieces(device: Device, width: int, size: int, queries: Sequence[int]) -> dict:
    """The same search when it takes more captions at a time, which a GPU's launches ask for: what could be."""
    rows, as_is = [], search.PIECE
    pool = _full_pool(device, size, width, "fp32")
    try:
        for search.PIECE in (as_is, 4 * as_is, 16 * as_is, 64 * as_is):
            for batch in queries:
                row = {"D": width, "P": size, "B": batch, "storage": "fp32", "piece": search.PIECE}
                asked = unit(batch, width, device)
                with device.peak(row):
                    row["search_s"] = device.median_s(lambda asked=asked: pool.nearest(asked))
                rows.append(say(row))
    finally:
        search.PIECE = as_is
    return {"pieces": rows}


def enqueues(device: Device, width: int, size: int, came: Sequence[int]) -> dict:
    """Seconds in which G captions that were gathered are written."""
    pool, rows = _full_pool(device, size, width, "fp32"), []
    for number in came:
        texts, ids = unit(number, width, device), torch.arange(number)
        call_s = device.median_s(lambda texts=texts, ids=ids: pool.enqueue(texts, ids))
        rows.append(say({"D": width, "P": size, "G": number, "enqueue_s": call_s}))
    return {"enqueues": rows}


def sharded_searches(device: Device, width: int, size: int, batch: int, worlds: Sequence[int]) -> dict:
    """What one rank of W does of the search of a pool that is spread over them, the wire left out."""
    rows = []
    for world in worlds:
        row = {"D": width, "P": size, "B": batch, "W": world}
        try:
            with fake_world(world), device.peak(row):
                pool = CaptionPool(size, width, backend="torch", shard_above=1, device=device.torch)
                fill(pool, device)
                asked = unit(batch, width, device)
                row["search_s"] = device.median_s(lambda pool=pool, asked=asked: pool.nearest(asked), runs=3)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        rows.append(say(row))
    return {"sharded": rows}


def _full_pool(device: Device, size: int, width: int, storage: str) -> CaptionPool:
    pool = CaptionPool(size, width, backend="torch", storage=storage, device=device.torch)  # pyright: ignore
    fill(pool, device)
    return pool


def fill(pool: CaptionPool, device: Device) -> None:
    for rows in pool.features.split(1 << 16):
        rows.copy_(search.snap(unit(len(rows), rows.shape[1], device)))
    pool.count = pool.size
    pool.ids.copy_(torch.arange(pool.size))


def defences(device: Device, model: str, sizes: Sequence[int], batch: int) -> dict:
    """What our own defence adds to a plain step, on all cores of one rank: neighbours, sample filter, suspicion model, both rings
    written."""
    rows, side = [], SIDE_PX
    towers = Towers(model).to(device.torch)
    for size in sizes:
        config = parse_config(f"name: scale\ndata: {{shards: none}}\nmodel: {{name: {model}}}\npool: {{size: {size}}}")
        defence = Defence(config, towers, device.torch)
        neighbours, width = defence.neighbours, towers.cfg["embed_dim"]
        assert neighbours is not None
        fill(defence.pool, device)
        some = torch.randint(0, 256, (512, 3, side, side), dtype=torch.uint8)
        tokens = torch.randint(1, 40000, (max(batch, 512), towers.context_length))
        neighbours.fit(raw_descriptors(some), tokens[:512])
        for ring in (neighbours.descriptors, neighbours.image_features, neighbours.text_features, neighbours.bags):
            ring.copy_(search.snap(F.normalize(torch.randn_like(ring), dim=1)))
        neighbours.count, neighbours.ids[:] = size, torch.arange(size)
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        ids, valid = torch.arange(size, size + batch), torch.ones(batch, dtype=torch.bool)
        batch_of_rank = Batch(images, tokens[:batch], ids, valid, ())
        at = Position(
            step=1000, samples_seen=1000 * batch, epoch=config.train.epochs, step_in_epoch=0, steps_per_epoch=100
        )
        x, t = unit(batch, width, device), unit(batch, width, device)

        def extra(defence=defence, batch_of_rank=batch_of_rank, at=at, x=x, t=t) -> None:
            defended = defence.step(batch_of_rank, at)
            defended.remember(x, t, defended.targets(x, t, batch_of_rank.valid.to(device.torch)))

        row = {"model": model, "P": size, "B": batch, "cores": torch.get_num_threads()}
        rows.append(say(row | {"defence_s": device.median_s(extra, runs=3, spent_s=6.0)}))
    return {"defences": rows}


# ---- the loss of a large world ----------------------------------------------------------------------------------


def losses(device: Device, width: int, batch: int, worlds: Sequence[int]) -> dict:
    """One rank's loss over G = B W pairs, forward and backward, and one gather of features: the wire left out."""
    rows = []
    for world in worlds:
        row = {"D": width, "B": batch, "W": world}
        x, t = (unit(batch, width, device).requires_grad_() for _ in range(2))
        scale, valid = torch.tensor([14.0], device=device.torch), torch.ones(batch, dtype=torch.bool, device=x.device)
        with fake_world(world), device.peak(row):
            row["loss_s"] = device.median_s(lambda x=x, t=t, s=scale, v=valid: clip_loss(x, t, s, v).backward())
            row["gather_s"] = device.median_s(lambda x=x: distributed.gather(x))
        rows.append(say(row))
    return {"losses": rows}
