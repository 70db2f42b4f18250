"""Run from test_kills.py: a training's checkpoints without the training.

killed_writer.py FOLDER STEP MOMENT    goes on where LATEST stands, saves each step up to STEP, and is killed (SIGKILL) as it
                                       is about to make a folder, or to rename or delete a file or folder, for the MOMENT-th
                                       time; 0 is never
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from roclip.checkpoint import checkpoint
from roclip.checkpoint.checkpoint import Cursor
from roclip.model.tensor_file import write_tensors
from roclip.model.towers import CONFIG, WEIGHTS
from roclip.storage import write_atomic

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Towers:
    """A few bytes that are saved as towers are."""

    def weights(self, copy) -> dict[str, torch.Tensor]:
        return {"weight": copy("weight", torch.ones(8))}

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> str:
        write_atomic(folder / CONFIG, "{}")
        return write_tensors(folder / WEIGHTS, weights)


def die_at(moment: int) -> None:
    """From now on count the changes that the interpreter is about to ask for."""
    seen = 0

    def watch(event: str, _: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in CHANGES:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_up_to(folder: Path, step: int) -> None:
    optimizer = torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    engine = SimpleNamespace(module=torch.nn.Module(), optimizer=optimizer, zero_optimization_stage=lambda: 0)
    towers: Any = Towers()
    writer, latest = checkpoint.Writer(folder, keep=1), checkpoint.named(folder, "LATEST")
    if latest is not None:
        checkpoint.verify(latest)
    done = checkpoint.cursor(latest).step if latest else 0
    for now in range(done + 1, step + 1):
        writer.save(engine, towers, {}, Cursor(now, 1, now, now, "plain"))
    writer.wait()


if __name__ == "__main__":
    die_at(int(sys.argv[3]))
    save_up_to(Path(sys.argv[1]), int(sys.argv[2]))
