"""The model against the truth where there are ranks: a step of two gloo processes, predicted and measured.

Three things take turns in one job, so that all meet the same machine: the step with its collectives cut (each answered by
what this rank has: what it computes stays), the collectives of a step alone, and the step as it is. Predicted is cut +
collectives, once with the collectives as they were timed alone, once by the model's formula from a latency and a bandwidth
that are fitted to an all-reduce and an all-gather of a few sizes. Of each the fastest round counts: what other programs on the
machine take is in no model. `small` is a model of 8 million weights, for a machine that is busy.

    torchrun --nproc-per-node=2 tests/bench/scale_ranks.py --out FILE.json [--models RN50 …] [--rounds 5]
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from scale_device import Device, machine
from scale_model import Wire
from scale_pool import fill

from roclip import distributed
from roclip.config import TrainConfig, environment_defaults
from roclip.defence.pool import CaptionPool
from roclip.model.towers import Towers
from roclip.training import accumulate
from roclip.training.engine import build_engine, gradient_norm, step
from roclip.training.losses import clip_loss

POOL, ROWS = 65_536, 4
SMALL = """{"embed_dim": 128, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32},
 "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4}}"""
SIZES = tuple(4**power for power in range(6, 14))
"""Bytes of the collectives that are fitted: 4 KiB to 64 MiB."""


class _Done:
    def wait(self) -> bool:
        return True


class Calls:
    """Stands in for torch's collectives: notes them, and answers them itself while `cut`."""

    def __init__(self):
        self.cut, self.seen = False, Counter[tuple[str, int]]()
        self.originals = {
            name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce")
        }

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        for name in self.originals:
            setattr(dist, name, self._stand_in(name))
        try:
            yield
        finally:
            for name, original in self.originals.items():
                setattr(dist, name, original)

    def _stand_in(self, name: str) -> Callable:
        def call(*args, **named):
            first = args[0] if args else named.get("tensor", named.get("output_tensor", named.get("tensor_list")))
            size = sum(t.numel() * t.element_size() for t in (first if isinstance(first, list) else [first]))
            self.seen[name, size] += 1
            if not self.cut:
                return self.originals[name](*args, **named)
            if name.startswith("all_gather"):
                sent = args[1] if len(args) > 1 else named.get("tensor", named.get("input_tensor"))
                for piece in first if isinstance(first, list) else first.flatten().chunk(dist.get_world_size()):
                    piece.copy_(sent.view_as(piece))
            return _Done() if named.get("async_op") else None

        return call

    def alone(self, noted: Counter[tuple[str, int]]) -> Callable[[], None]:
        """The noted collectives, on tensors of their own, one after the other."""
        ranks, largest = dist.get_world_size(), max((size for _, size in noted), default=0)
        whole = torch.zeros(max(largest // 4, 1))
        piece = torch.zeros(max(largest // 4 // ranks, 1))

        def run() -> None:
            for (name, size), times in noted.items():
                for _ in range(times):
                    if name in ("all_reduce", "reduce"):
                        self.originals["all_reduce"](whole[: max(size // 4, 1)])
                    else:
                        part = piece[: max(size // 4 // ranks, 1)]
                        self.originals["all_gather"]([torch.empty_like(part) for _ in range(ranks)], part)

        return run


def fit(device: Device) -> dict:
    """Latency of a hop and bandwidth of the link, from collectives of a few sizes, by the model's own formula."""
    ranks, rows, seconds = dist.get_world_size(), [], []
    for size in SIZES:
        for name, terms in (("all_reduce", 2 * (ranks - 1)), ("all_gather", ranks - 1)):
            alone = Calls().alone(Counter({(name, size): 1}))
            took_s = min(_together_s(device, alone) for _ in range(9))
            rows.append([terms, terms / ranks * size])
            seconds.append(took_s)
    terms, took_s = np.array(rows), np.array(seconds)
    scaled = terms / took_s[:, None]  # small and large count alike
    hop_s, byte_s = np.linalg.lstsq(scaled, np.ones(len(took_s)), rcond=None)[0]
    return {
        "hop_s": max(float(hop_s), 0.0),
        "bytes_per_s": 1 / float(byte_s),
        "seconds": [round(s, 6) for s in seconds],
    }


def _together_s(device: Device, call: Callable[[], object]) -> float:
    dist.barrier()
    took_s = device.once_s(call)
    slowest = torch.tensor([took_s])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def steps(model: str, device: Device) -> dict[str, Callable[[], None]]:
    """The plain and the matched step, with a pool."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.json"
        file.write_text(SMALL)
        towers = Towers(model, file if model == "small" else None).train()
    engine = build_engine(towers, TrainConfig(global_batch_size=ROWS * dist.get_world_size(), lr=1e-6))
    pool = CaptionPool(POOL, towers.cfg["embed_dim"], backend="torch")
    fill(pool, device)
    images = torch.rand(ROWS, 3, towers.image_size, towers.image_size)
    tokens = torch.randint(1, 40000, (ROWS, towers.context_length))
    ids, valid = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.bool)

    def one(matched: bool) -> None:
        (x, t, scale), backward = accumulate.forward(engine, images, tokens, text_gradient=not matched)
        match = pool.nearest(x) if matched else None
        learnt = t if match is None else match.features
        same = ids if match is None else pool.ids[match.slots]
        backward(clip_loss(x, learnt, scale, valid, same))
        float(gradient_norm(engine))
        step(engine, towers)
        pool.enqueue(t.detach(), ids, valid=valid)

    return {"plain": lambda: one(False), "matched": lambda: one(True)}


def compare(model: str, device: Device, rounds: int, wire: Wire) -> list[dict]:
    calls, rows = Calls(), []
    with calls.installed():
        for kind, one in steps(model, device).items():
            one()
            calls.seen.clear()
            one()
            noted = calls.seen.copy()
            alone, times = calls.alone(noted), {"cut": [], "collectives": [], "step": []}
            for _ in range(rounds):
                calls.cut = True
                dist.barrier()
                cut_s = device.once_s(one)
                calls.cut = False
                slowest = torch.tensor([cut_s])
                calls.originals["all_reduce"](slowest, op=dist.ReduceOp.MAX)
                times["cut"].append(float(slowest))
                times["collectives"].append(_together_s(device, alone))
                times["step"].append(_together_s(device, one))
            best = {name: min(values) for name, values in times.items()}
            by_formula = sum(
                times * (wire.all_gather_s(size) if name.startswith("all_gather") else wire.all_reduce_s(size))
                for (name, size), times in noted.items()
            )
            row = {"model": model, "kind": kind, "ranks": dist.get_world_size(), "B": ROWS, "P": POOL, "rounds": rounds}
            row |= {f"{name}_s": round(value, 4) for name, value in best.items()}
            row |= {"formula_s": round(by_formula, 4), "wire_bytes": sum(s * n for (_, s), n in noted.items())}
            row["calls"] = noted.total()
            row["error_alone_frac"] = round((best["cut"] + best["collectives"]) / best["step"] - 1, 3)
            row["error_formula_frac"] = round((best["cut"] + by_formula) / best["step"] - 1, 3)
            rows.append(row)
            if distributed.rank() == 0:
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "RN50"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    environment_defaults()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    device = Device("cpu")
    try:
        fitted = fit(device)
        wire = Wire.ring(dist.get_world_size(), fitted["bytes_per_s"], fitted["hop_s"])
        rows = [row for model in given.models for row in compare(model, device, given.rounds, wire)]
        if distributed.rank() == 0:
            found = {"machine": machine(), "fitted": fitted, "ranks": rows}
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
