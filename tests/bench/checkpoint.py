"""Training time lost to checkpoints at one a minute, against a budget of 2 %: ViT-B/32, AdamW's state of 1.8 GB.

Lost is what the steps take longer from the call that saves until all is on disk, over 60 s. Steps with and without a
checkpoint alternate. Also the part of it in which the training stands still, the copy.

    python tests/bench/checkpoint.py [--quick]
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import torch
from bench import measure

from roclip.checkpoint.checkpoint import Cursor, Writer
from roclip.config import TrainConfig, environment_defaults
from roclip.model.towers import Towers
from roclip.training.engine import build_engine, step
from roclip.training.losses import clip_loss

BUDGET, INTERVAL_S = 0.02, 60.0

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    environment_defaults()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, rows = ("ViT-S-32", 8) if arguments.quick else ("ViT-B-32", 256 if device.type == "cuda" else 8)
    towers = Towers(name).to(device).train()
    engine = build_engine(towers, TrainConfig(global_batch_size=rows, lr=1e-6))
    images = torch.rand(rows, 3, towers.image_size, towers.image_size, device=device)
    tokens = torch.randint(1, 40000, (rows, towers.context_length), device=device)

    def one_step() -> None:
        engine.backward(clip_loss(*engine(images, tokens)))
        step(engine, towers)

    with tempfile.TemporaryDirectory() as folder:
        writer, numbers = Writer(Path(folder), keep=1), itertools.count(1)

        def lost_share() -> float:
            """Steps until the checkpoint is on disk, then as many without one."""
            number = next(numbers)
            steps, start = 0, time.perf_counter()
            writer.save(engine, towers, {}, Cursor(number, 1, number, 0, "plain"))
            while writer._writing is not None and not writer._writing.done():
                one_step()
                steps += 1
            saving_s = time.perf_counter() - start
            start = time.perf_counter()
            for _ in range(steps):
                one_step()
            return (saving_s - (time.perf_counter() - start)) / INTERVAL_S

        def still_share() -> float:
            number = next(numbers)
            start = time.perf_counter()
            writer.save(engine, towers, {}, Cursor(number, 1, number, 0, "plain"))
            still_s = time.perf_counter() - start
            writer.wait()
            return still_s / INTERVAL_S

        one_step()
        runs = 3 if arguments.quick else 7
        measure("checkpoint", f"time lost, {name}, {device.type}", "share", lost_share, BUDGET, 1.0, runs=runs)
        measure(
            "checkpoint", f"training stands still, {name}, {device.type}", "share", still_share, BUDGET, 1.0, runs=3
        )
