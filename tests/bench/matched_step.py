"""A matched step (search the pool, learn with what it found, enqueue) against a plain one (learn, enqueue): seconds.

ratio = plain / matched; the bar 1/1.06 (CPU) or 1/1.02 (GPU) says that a matched step may take 6 % or 2 % longer
(1.06 is the published figure: SafeCLIP, arXiv:2310.05862, table 8).

python tests/bench/matched_step.py [--quick]
"""

import argparse

import torch
import torch.nn.functional as F
from bench import measure

from roclip.config import TrainConfig, environment_defaults
from roclip.defence.pool import CaptionPool
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine, step
from roclip.training.losses import clip_loss


def steps_of(name: str, rows: int, size: int, device: torch.device):
    """The two steps of one model, as functions, with a full pool of random unit-length features."""
    torch.manual_seed(0)
    towers = Towers(name).to(device).train()
    engine = build_engine(towers, TrainConfig(global_batch_size=rows, lr=1e-6))
    pool = CaptionPool(size, towers.cfg["embed_dim"], device=device)
    pool.enqueue(F.normalize(torch.randn(size, towers.cfg["embed_dim"], device=device), dim=-1), torch.arange(size))
    images = torch.rand(rows, 3, towers.image_size, towers.image_size, device=device)
    tokens = torch.randint(1, 40000, (rows, 77), device=device)
    ids, keep = torch.arange(rows, device=device), torch.ones(rows, dtype=torch.bool, device=device)

    def run(matched: bool) -> None:
        (image_features, text_features, scale), backward = accumulate.forward(
            engine, images, tokens, text_gradient=not matched
        )
        targets = pool.nearest(image_features)[0] if matched else text_features
        backward(clip_loss(image_features, targets, scale, keep))
        step(engine, towers)
        pool.enqueue(text_features.detach(), ids)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return lambda: run(True), lambda: run(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    environment_defaults()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bar = round(1 / (1.02 if device.type == "cuda" else 1.06), 4)
    rows = 256 if device.type == "cuda" else 8 if quick else 16
    for name in ("ViT-S-32",) if quick else ("ViT-B-32", "RN50"):
        matched, plain = steps_of(name, rows, 65_536, device)
        case = f"{name}, P = 65,536, batch {rows}, fp32, {device.type}"
        measure("matched_step", case, "s", matched, plain, bar, runs=3 if quick else 7)
        del matched, plain
