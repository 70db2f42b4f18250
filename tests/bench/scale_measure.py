"""What `scale.py` predicts from, measured on the machine at hand through the product's own parts.

One process and one device: the steps of the towers and a checkpoint of them, the loader, and what `scale_pool.py` measures.
"""

import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from scale_device import Device, machine, say, unit
from scale_pool import defences, enqueues, larger_pieces, losses, searches, sharded_searches

from roclip.checkpoint.checkpoint import Cursor, Writer
from roclip.config import AugmentConfig, TrainConfig, environment_defaults
from roclip.data.augment import augment
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine, gradient_norm, step
from roclip.training.losses import clip_loss

STORED_PX = 256


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
    """A step as `roclip/training/loop.py` has it, from the host's uint8 images on, without the pool."""
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


def loading(device: Device, workers: Sequence[int], shards: int, per_shard: int) -> dict:
    """Images a second out of tars of 256-px JPEGs on the local disk, read once before; bytes of one."""
    from kit import write_shard

    from roclip.attacks import scenes
    from roclip.data.shards import Manifest
    from roclip.data.stream import Stream, StreamSettings, take_snapshot

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
                StreamSettings(STORED_PX, 64, seed=0, streams=16, shuffle_buffer=1024, workers=count),
                tokenize=lambda captions: tokenizer(list(captions)),
            )
            batches = iter(stream.epoch(snapshot, 1))
            for _ in range(2 * count + 1):
                next(batches)  # workers have started, and what they read ahead of the clock is gone
            start, seen = time.perf_counter(), 0
            for batch in batches:
                seen += len(batch.images)
            rows.append(say({"workers": count, "images_per_s": seen / (time.perf_counter() - start)}))
    return {"loader": [row | {"image_bytes": image_bytes} for row in rows]}


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
