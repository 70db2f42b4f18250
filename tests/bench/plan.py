"""One rank's plan of an epoch: building it, and asking it for every sample of the rank, against a budget of 5 s and 1 GiB.

1,000,000 shards of some 5,000 samples, 4,096 ranks, a global batch of 65,536, as many streams as ranks. Also what a
checkpoint has to keep of it (bytes), and with `--growth FILE.json` how time grows from 1,000 shards on (`figures.py` draws it).

    python tests/bench/plan.py [--quick] [--growth FILE.json]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bench import measure

from roclip.data.order import EpochOrder

RANKS, GLOBAL_BATCH = 4096, 65_536
ROWS = GLOBAL_BATCH // RANKS
AT_ONCE = 4096
"""Steps asked for at a time; a loader asks for one."""


def whole_plan(shards: int, rank: int = 1234) -> int:
    samples = np.random.default_rng(0).integers(4_000, 6_001, shards)
    order = EpochOrder(samples, seed=0, epoch=1, streams=RANKS, shuffle_buffer=1024, run_length=ROWS)
    steps = len(order) // GLOBAL_BATCH
    for first in range(0, steps, AT_ONCE):
        starts = np.arange(first, min(first + AT_ONCE, steps)) * GLOBAL_BATCH + rank * ROWS
        order.at((starts[:, None] + np.arange(ROWS)).ravel())
    return len(order)


def peak_bytes(shards: int) -> float:
    """Peak resident set of a fresh process that makes the plan, its interpreter and numpy included."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(shards)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def growth() -> dict[str, list[float]]:
    """Seconds of a rank's epoch by the number of shards."""
    sizes = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    seconds = []
    for shards in sizes:
        start = time.perf_counter()
        whole_plan(shards)
        seconds.append(time.perf_counter() - start)
    return {"shards": [float(shards) for shards in sizes], "seconds": seconds}


def plot(found: Mapping[str, Any], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "plan"}):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.loglog(found["shards"], found["seconds"], marker="o", color="#1f6f8b")
        axes.set_xlabel("shards of 5,000 samples")
        axes.set_ylabel("one of 4,096 ranks' epoch, s")
        axes.grid(color="#e6e6e6")
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--growth", type=Path, metavar="FILE.json")
    parser.add_argument("--child", type=int)
    arguments = parser.parse_args()
    if arguments.child:
        whole_plan(arguments.child)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        sys.exit()
    shards, runs = (10_000, 3) if arguments.quick else (1_000_000, 5)
    case = f"{shards:,} shards, {RANKS:,} ranks"
    measure("plan", f"time, {case}", "s", lambda: whole_plan(shards) and None, 5.0, 1.0, runs=runs)
    measure("plan", f"memory, {case}", "bytes", lambda: peak_bytes(shards), 2.0**30, 1.0, runs=1)
    from roclip.checkpoint.pointers import Cursor  # loads torch, which the plan does not need

    state = len(json.dumps(asdict(Cursor(10**9, 10**4, 10**7, 10**13, "matched"))))
    measure("plan", f"state, {case}", "bytes", lambda: float(state), 1024.0, 1.0, runs=1)
    if arguments.growth:
        arguments.growth.write_text(json.dumps(growth(), indent=1) + "\n")
