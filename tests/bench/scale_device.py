"""The device that `scale.py` measures: its clock, its memory, worlds of ranks that send nothing.

A large world is torch's `fake` process group: it copies and sends nothing, so that what is timed is what one rank computes,
copies and allocates; the wire is the model's part.
"""

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F


def machine() -> dict:
    """Where this runs, and what runs."""
    found = {
        "host_cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
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


def say(row: dict) -> dict:
    """Print a row as it comes, its times as one median."""
    shown = {key: statistics.median(value) if isinstance(value, list) else value for key, value in row.items()}
    print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in shown.items()}, flush=True)
    return row
