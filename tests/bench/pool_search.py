"""The pool's work of a matched step, ours against the official bank's, as that one is described: time and extra memory.

The official code (RoCLIP's NNMemoryBankModule over a lightly bank) keeps the captions as a D x P matrix. A look-up copies
it, normalises the copy into another one, multiplies the whole global batch with it into a B x P matrix, and takes the
arg-max. A matched step looks up twice, the second time only in passing, to write its captions.

Time alternates in one process. Extra memory is the peak resident set of a fresh process above what it held with the
captions in place (VmHWM, reset by clear_refs). `--quick`: the smallest pool, fewer runs.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import measure

from roclip.defence.pool import CaptionPool

B, D = 512, 1024
SIZES = (21_845, 65_536, 262_144)


class OfficialBank:
    """Written from the description above; float32, as a CPU runs it."""

    def __init__(self, size: int):
        self.bank = torch.empty(D, size)
        for start in range(0, size, B):
            self.bank[:, start : start + B] = unit(min(B, size - start), start).T
        self.cursor = 0

    def look_up(self, queries: torch.Tensor) -> torch.Tensor:
        captions = self.bank.clone().T
        scores = F.normalize(queries, dim=1) @ F.normalize(captions, dim=1).T
        return captions[scores.argmax(dim=1)]

    def step(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        matched = self.look_up(images)
        self.look_up(texts)
        kept = min(len(texts), self.bank.shape[1] - self.cursor)  # what would wrap around is dropped
        self.bank[:, self.cursor : self.cursor + kept] = texts[:kept].T
        self.cursor = (self.cursor + kept) % self.bank.shape[1]
        return matched


class OurPool:
    def __init__(self, size: int):
        self.pool = CaptionPool(size, D, batch=B)
        for start in range(0, size, B):
            rows = min(B, size - start)
            self.pool.enqueue(unit(rows, start), torch.arange(start, start + rows))

    def step(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        matched = self.pool.nearest(images).features
        self.pool.enqueue(texts, torch.arange(B))
        return matched


SIDES = {"ours": OurPool, "peer": OfficialBank}


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def extra_bytes(side: str, size: int) -> int:
    """Peak of one step above the state, in this process."""
    SIDES[side](B).step(unit(B, 1), unit(B, 2))  # libraries take their buffers
    images, texts, holder = unit(B, 1), unit(B, 2), SIDES[side](size)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    holder.step(images, texts)
    return peak_bytes() - before


def in_child(side: str, size: int) -> float:
    command = [sys.executable, __file__, "--child", side, "--size", str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_case(size: int, runs: int) -> None:
    images, texts = unit(B, 1), unit(B, 2)
    ours, peer = OurPool(size), OfficialBank(size)
    assert torch.allclose(ours.step(images, texts), peer.step(images, texts), atol=1e-6)
    calls = [partial(_step, holder, images, texts) for holder in (ours, peer)]
    measure("pool_search", f"time P={size} B={B} D={D}", "s", *calls, bar=4.0, runs=runs)


def _step(holder: OurPool | OfficialBank, images: torch.Tensor, texts: torch.Tensor) -> None:
    holder.step(images, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", choices=SIDES)
    parser.add_argument("--size", type=int)
    options = parser.parse_args()
    if options.child:
        print(extra_bytes(options.child, options.size))
        return
    for size in SIZES[:1] if options.quick else SIZES:
        time_case(size, 3 if options.quick else 7)
        calls = [partial(in_child, side, size) for side in SIDES]
        runs = 1 if options.quick else 3
        measure("pool_search", f"extra memory P={size} B={B} D={D}", "bytes", *calls, bar=2.0, runs=runs)


if __name__ == "__main__":
    main()
