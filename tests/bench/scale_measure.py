"""What `scale.py` predicts from, measured on the machine at hand through the product's own parts.

One process and one device: the steps of the towers, the pool's search, what a rank computes of the loss of a large world,
the loader, a checkpoint. A large world is torch's `fake` process group: it copies and sends nothing, so that what is timed
is what one rank computes, copies and allocates; the wire is the model's part. Each value is a median of a few runs.
"""

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from roclip import accumulate, distributed, search
from roclip.augment import augment
from roclip.checkpoint import Cursor, Writer
from roclip.config import TrainConfig, environment_defaults, parse_config
from roclip.defence import Defence
from roclip.engine import build_engine, gradient_norm, step
from roclip.looks import impressions
from roclip.loss import clip_loss
from roclip.model import Towers
from roclip.pool import CaptionPool
from roclip.schedule import Position
from roclip.sections_train import AugmentConfig
from roclip.stream import Batch

STORED_PX = 256
LONGEST_S = 1.5
"""One call that would take longer is not measured; what was left out is said."""


def machine() -> dict:
    """Where this runs, and what runs."""
    found = {
        "host_cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpu_bytes": torch.cuda.get_device_properties(0).total_memory}
    return found


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


class Device:
    """Times and memory of one device."""

    def __init__(self, name: str):
        self.torch, self.cuda = torch.device(name), name == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def once_s(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def median_s(self, call: Callable[[], object], runs: int = 5, spent_s: float = 1.0) -> float:
        """After one call to warm up; fewer runs where they would take long."""
        first_s = self.once_s(call)
        runs = max(1, min(runs, int(spent_s / max(first_s, 1e-6))))
        return statistics.median(self.once_s(call) for _ in range(runs))

    @contextlib.contextmanager
    def peak(self, row: dict) -> Iterator[None]:
        """Put the peak of the device's memory above what was held into `row` (GPU only)."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        yield
        if self.cuda:
            row["extra_bytes"] = torch.cuda.max_memory_allocated() - held


def unit(rows: int, width: int, device: Device) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, device=device.torch), dim=1)


@contextlib.contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """As rank 0 of so many ranks that send nothing: each receives copies of what it sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if ranks > 1:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        if ranks > 1:
            dist.destroy_process_group()


# ---- steps ------------------------------------------------------------------------------------------------------


def steps(device: Device, model: str, precision: str, batches: Sequence[int], runs: int) -> dict:
    """Steps of one model: seconds of each, and of its parts; the weights; a checkpoint of it."""
    towers = Towers(model).to(device.torch).train()
    config = TrainConfig(global_batch_size=batches[0], precision=precision, lr=1e-6)  # pyright: ignore
    weights = sum(p.numel() for p in towers.parameters())
    layers = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in towers.modules())
    engine = build_engine(towers, config)
    rows, width = [], towers.cfg["embed_dim"]
    for batch in batches:
        for kind in ("plain", "matched"):
            row = {"model": model, "precision": precision, "B": batch, "kind": kind, "D": width}
            try:
                with device.peak(row):
                    row |= _time_steps(device, engine, towers, batch, kind == "matched", runs)
            except torch.cuda.OutOfMemoryError:
                row["out_of_memory"] = True
            say(row)
            rows.append(row)
    found = {"model": model, "precision": precision, "weights": weights, "batch_norm_layers": layers, "D": width}
    with tempfile.TemporaryDirectory() as folder:
        found |= _checkpoint(device, engine, towers, Path(folder))
    return {"steps": rows, "models": [say(found)]}


def _time_steps(device: Device, engine, towers: Towers, batch: int, matched: bool, runs: int) -> dict:
    """A step as `roclip/train.py` has it, from the host's uint8 images on, without the pool."""
    images = torch.randint(0, 256, (batch, 3, STORED_PX, STORED_PX), dtype=torch.uint8)
    images = images.pin_memory() if device.cuda else images
    tokens = torch.randint(1, 40000, (batch, towers.context_length))
    tokens[:, -1] = 49407
    ids, valid = torch.arange(batch), torch.ones(batch, dtype=torch.bool, device=device.torch)
    found = unit(batch, towers.cfg["embed_dim"], device)
    parts: dict[str, list[float]] = {}

    def one(timed: bool) -> None:
        last_s = time.perf_counter()

        def tick(part: str) -> None:
            nonlocal last_s
            if timed:
                device.wait()
                now_s = time.perf_counter()
                parts.setdefault(part, []).append(now_s - last_s)
                last_s = now_s

        pixels = images.to(device.torch, non_blocking=True)
        pixels = augment(pixels, ids, AugmentConfig(), seed=0, epoch=1, size=towers.image_size)
        tick("augment_s")
        (image_features, text_features, scale), backward = accumulate.forward(
            engine, pixels, tokens.to(device.torch), text_gradient=not matched
        )
        tick("forward_s")
        loss = clip_loss(image_features, found if matched else text_features, scale, valid)
        tick("loss_s")
        backward(loss)
        tick("backward_s")
        float(gradient_norm(engine))
        step(engine, towers)
        tick("optimizer_s")

    for _ in range(min(3, runs)):
        one(False)
    each = [device.once_s(lambda: one(False)) for _ in range(runs)]
    for _ in range(max(2, runs // 5)):
        one(True)
    return {"step_s": [round(s, 6) for s in each], **{name: statistics.median(s) for name, s in parts.items()}}


def _checkpoint(device: Device, engine, towers: Towers, folder: Path) -> dict:
    writer = Writer(folder, keep=1)
    writer.save(engine, towers, {}, Cursor(1, 1, 1, 0, "plain"))  # takes its memory
    writer.wait()
    still_s = device.once_s(lambda: writer.save(engine, towers, {}, Cursor(2, 1, 2, 0, "plain")))
    written_s = device.once_s(writer.wait)
    size = sum(path.stat().st_size for path in (folder / "step-00000002").iterdir())
    return {"checkpoint_bytes": size, "checkpoint_still_s": still_s, "checkpoint_written_s": written_s}


# ---- the pool ---------------------------------------------------------------------------------------------------


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
                _fill(pool, device)
                asked = unit(batch, width, device)
                row["search_s"] = device.median_s(lambda pool=pool, asked=asked: pool.nearest(asked), runs=3)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        rows.append(say(row))
    return {"sharded": rows}


def _full_pool(device: Device, size: int, width: int, storage: str) -> CaptionPool:
    pool = CaptionPool(size, width, backend="torch", storage=storage, device=device.torch)  # pyright: ignore
    _fill(pool, device)
    return pool


def _fill(pool: CaptionPool, device: Device) -> None:
    for rows in pool.features.split(1 << 16):
        rows.copy_(search.snap(unit(len(rows), rows.shape[1], device)))
    pool.count = pool.size
    pool.ids.copy_(torch.arange(pool.size))


def defences(device: Device, model: str, sizes: Sequence[int], batch: int) -> dict:
    """What our own defence adds to a plain step, on all cores of one rank: witnesses, gate, scout, both rings written."""
    rows, side = [], STORED_PX
    towers = Towers(model).to(device.torch)
    for size in sizes:
        config = parse_config(f"name: scale\ndata: {{shards: none}}\nmodel: {{name: {model}}}\npool: {{size: {size}}}")
        defence = Defence(config, towers, device.torch)
        witnesses, width = defence.witnesses, towers.cfg["embed_dim"]
        assert witnesses is not None
        _fill(defence.pool, device)
        some = torch.randint(0, 256, (512, 3, side, side), dtype=torch.uint8)
        tokens = torch.randint(1, 40000, (max(batch, 512), towers.context_length))
        witnesses.fit(impressions(some), tokens[:512])
        for ring in (witnesses.looks, witnesses.features, witnesses.texts, witnesses.words):
            ring.copy_(search.snap(F.normalize(torch.randn_like(ring), dim=1)))
        witnesses.count, witnesses.ids[:] = size, torch.arange(size)
        images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        ids, valid = torch.arange(size, size + batch), torch.ones(batch, dtype=torch.bool)
        batch_of_rank = Batch(images, tokens[:batch], ids, valid, ())
        at = Position(
            step=1000, samples_seen=1000 * batch, epoch=config.train.epochs, step_in_epoch=0, steps_per_epoch=100
        )
        x, t = unit(batch, width, device), unit(batch, width, device)

        def extra(defence=defence, batch_of_rank=batch_of_rank, at=at, x=x, t=t) -> None:
            defended = defence.step(batch_of_rank, at)
            defended.remember(x, t, defended.lesson(x, t, batch_of_rank.valid.to(device.torch)))

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


# ---- the loader -------------------------------------------------------------------------------------------------


def loading(device: Device, workers: Sequence[int], shards: int, per_shard: int) -> dict:
    """Images a second out of tars of 256-px JPEGs on the local disk, read once before; bytes of one."""
    from kit import write_shard

    from roclip import scenes
    from roclip.shards import Manifest
    from roclip.stream import Stream, take_snapshot

    import open_clip  # isort: skip

    tokenizer, rows = open_clip.get_tokenizer("ViT-B-32"), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rendered = [scenes.render(each, seed=0, size_px=STORED_PX) for each in range(per_shard)]
        samples = [(scenes.encode(scene.image, "jpeg"), scene.caption) for scene in rendered]
        for number in range(shards):
            write_shard(root, number, samples, per_shard)
        snapshot = take_snapshot(Manifest(root))
        image_bytes = sum(record.bytes for record in snapshot.records) / (shards * per_shard)
        for count in workers:
            stream = Stream(
                root,
                tokenize=lambda captions: tokenizer(list(captions)),
                image_size=STORED_PX,
                global_batch_size=64,
                rank=0,
                world_size=1,
                seed=0,
                streams=16,
                shuffle_buffer=1024,
                workers=count,
            )
            batches = iter(stream.epoch(snapshot, 1))
            for _ in range(2 * count + 1):
                next(batches)  # workers have started, and what they read ahead of the clock is gone
            start, seen = time.perf_counter(), 0
            for batch in batches:
                seen += len(batch.images)
            rows.append(say({"workers": count, "images_per_s": seen / (time.perf_counter() - start)}))
    return {"loader": [row | {"image_bytes": image_bytes} for row in rows]}


def say(row: dict) -> dict:
    """Print a row as it comes, its times as one median."""
    shown = {key: statistics.median(value) if isinstance(value, list) else value for key, value in row.items()}
    print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in shown.items()}, flush=True)
    return row


# ---- all of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    models: tuple[str, ...] = ("RN50", "ViT-B-16")
    batches: tuple[int, ...] = (32, 128, 256, 512)
    runs: int = 25
    widths: tuple[int, ...] = (512, 1024)
    pools: tuple[int, ...] = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
    queries: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    worlds: tuple[int, ...] = (1, 8, 64, 256, 1024)
    rows: int = 256
    """B of the loss, the sharded pool and the defence."""
    defended: tuple[int, ...] = (21_845, 65_536)
    workers: tuple[int, ...] = (0, 1, 4, 16)
    shards: tuple[int, int] = (32, 256)
    """Tars, and pairs in each."""


CPU = Sizes(
    batches=(8, 16),
    runs=5,
    pools=(1 << 16, 1 << 18),
    queries=(16, 256),
    rows=16,
    defended=(21_845,),
    workers=(0, 1, 2),
    shards=(16, 256),
)
QUICK = Sizes(("ViT-S-32",), (4,), 3, (64,), (4096, 8192), (16, 64), (1, 8), 16, (4096,), (0, 1), (4, 128))


def measure(name: str, quick: bool, save: Callable[[dict], None]) -> dict:
    """Everything of this machine, in some four minutes on a GPU. What fails is named in the result, the rest goes on."""
    environment_defaults()
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    device, found = Device(name), {"machine": machine(), "failed": []}
    sizes = QUICK if quick else Sizes() if name == "cuda" else CPU
    precision, width = "bf16" if name == "cuda" else "fp32", sizes.widths[0]
    parts: list[Callable[[], dict]] = [
        *(partial(losses, device, width, sizes.rows, sizes.worlds) for width in sizes.widths),
        partial(sharded_searches, device, width, sizes.pools[-1], sizes.rows, sizes.worlds[1:]),
        partial(loading, device, sizes.workers, *sizes.shards),
        *(partial(steps, device, model, precision, sizes.batches, sizes.runs) for model in sizes.models),
        partial(larger_pieces, device, width, sizes.pools[-2], sizes.queries[:2]),
        *(partial(enqueues, device, width, sizes.pools[-1], (256, 4096, 65536)) for width in sizes.widths),
        *(partial(searches, device, width, sizes.pools, sizes.queries) for width in sizes.widths),
        partial(defences, device, sizes.models[-1], sizes.defended, sizes.rows),
    ]
    for part in parts:
        began_s = time.perf_counter()
        try:
            rows = part()
        except Exception as error:
            traceback.print_exc()
            found["failed"].append(f"{part.func.__name__}: {error!r}")
            continue
        for key, more in rows.items():
            found.setdefault(key, []).extend(more)
        print(f"{part.func.__name__}: {time.perf_counter() - began_s:.0f} s", flush=True)
        save(found)
    save(found)
    return found
