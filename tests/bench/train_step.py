"""Our training step (towers, loss, DeepSpeed) against open_clip_train's own, on the same synthetic batch: samples/s.

The peer is `open_clip_train.train.train_one_epoch` itself, over a loader that holds one batch, with the optimizer and the
DistributedDataParallel of `open_clip_train.main`. Ours is the step of `roclip/training/loop.py` from pixels to weights. Both read
the same images as float and tokens; neither augments. The same model, batch and precision (fp32), all cores for one
process and one thread each for two, no synchronised batch norm (the peer has none on a CPU).

    python tests/bench/train_step.py [--quick]                                  one process
    torchrun --nproc-per-node=2 tests/bench/train_step.py [--quick]             two gloo ranks
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from types import SimpleNamespace

import torch
from bench import measure

from roclip import distributed
from roclip.config import ModelConfig, TrainConfig, environment_defaults
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine, step
from roclip.training.losses import clip_loss


def batch(towers: Towers, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(distributed.rank())
    images = torch.rand(rows, 3, towers.image_size, towers.image_size, generator=generator)
    tokens = torch.randint(1, 40000, (rows, towers.clip.context_length), generator=generator)
    tokens[:, -1] = 49407
    return images.to(DEVICE), tokens.to(DEVICE)


def our_step(name: str, rows: int, stage: int):
    towers = Towers(name, options=ModelConfig(sync_batch_norm=False)).to(DEVICE).train()
    settings = TrainConfig(global_batch_size=rows * distributed.world_size(), zero_stage=stage)  # pyright: ignore
    engine = build_engine(towers, settings)
    images, tokens = batch(towers, rows)
    keep = torch.ones(rows, dtype=torch.bool, device=DEVICE)

    def run(steps: int) -> None:
        for _ in range(steps):
            outputs, backward = accumulate.forward(engine, images, tokens)
            loss = clip_loss(*outputs[:3], keep)
            int(distributed.all_sum((~keep).sum()))  # training counts broken samples,
            assert torch.isfinite(distributed.all_sum(loss))  # and looks at the loss each step
            backward(loss)
            step(engine, towers)

    return run


def their_step(name: str, rows: int):
    import open_clip
    from open_clip_train.train import train_one_epoch

    root = logging.getLogger()
    root.setLevel(logging.ERROR)
    model = open_clip.create_model(name, load_weights=False, output_dict=True, device=DEVICE).train()
    world_size = distributed.world_size()
    if world_size > 1:
        ids = [DEVICE] if DEVICE.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias"))]
    rest = [p for p in model.parameters() if not any(p is q for q in plain)]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    loss = open_clip.ClipLoss(
        local_loss=world_size > 1, gather_with_grad=world_size > 1, rank=distributed.rank(), world_size=world_size
    )
    towers = SimpleNamespace(
        image_size=open_clip.get_model_config(name)["vision_cfg"]["image_size"], clip=SimpleNamespace(context_length=77)
    )
    images, tokens = batch(towers, rows)  # pyright: ignore[reportArgumentType]
    mean, std = (
        torch.tensor(v, device=DEVICE).view(1, 3, 1, 1)
        for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (images - mean) / std  # their loader normalises
    args = SimpleNamespace(
        device=str(DEVICE),
        precision="fp32",
        distill=False,
        accum_freq=1,
        batch_size=rows,
        skip_scheduler=True,
        grad_clip_norm=None,
        log_every_n_steps=10**9,
        rank=distributed.rank(),
        local_rank=distributed.rank(),
        world_size=world_size,
        log_local=False,
        wandb=False,
    )

    class Loader:
        def __init__(self, steps: int):
            self.num_batches, self.num_samples = steps, steps * rows * world_size
            self.items = [(images, tokens)] * steps

        def __iter__(self):
            return iter(self.items)

    def run(steps: int) -> None:
        loader = SimpleNamespace(dataloader=Loader(steps), set_epoch=lambda _: None)
        with contextlib.redirect_stdout(io.StringIO()):
            train_one_epoch(model, {"train": loader}, loss, 0, optimizer, None, None, None, args)

    return run


def rate(run, steps: int, rows: int):
    def value() -> float:
        distributed.barrier()
        start = time.perf_counter()
        run(steps)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()
        return rows * distributed.world_size() * steps / (time.perf_counter() - start)

    return value


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"])
    parser.add_argument(
        "--stages", nargs="+", type=int, default=[0], help="ZeRO stages of ours; 0 is what the peer does"
    )
    arguments = parser.parse_args()
    environment_defaults()
    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    torch.set_num_threads(1 if distributed.world_size() > 1 else torch.get_num_threads())
    rows = 256 if DEVICE.type == "cuda" else 8 if arguments.quick else 16 // distributed.world_size()
    models = ["ViT-S-32"] if arguments.quick else arguments.models
    for model in models:
        for stage in arguments.stages:
            torch.manual_seed(0)
            ours, theirs = our_step(model, rows, stage), their_step(model, rows)
            steps, runs = (1, 3) if arguments.quick else (2, 5)
            out = sys.stdout if distributed.rank() == 0 else io.StringIO()
            with contextlib.redirect_stdout(out):
                case = f"{model}, ZeRO {stage}, {rows} a rank, {distributed.world_size()} ranks, fp32, {DEVICE.type}"
                measure(
                    "train_step",
                    case,
                    "samples/s",
                    rate(ours, steps, rows),
                    rate(theirs, steps, rows),
                    1.0,
                    runs,
                    False,
                )
            del ours, theirs
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
