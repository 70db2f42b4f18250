"""One rank's plan of an epoch: building it, and asking it for every sample of the rank, against a budget of 5 s and 1 GiB.

1,000,000 shards of some 5,000 samples, 4,096 ranks, a global batch of 65,536, as many streams as ranks. Also what a
checkpoint has to keep of it (bytes), and with `--plot FILE.svg` how time grows from 1,000 shards on.

    python tests/bench/plan.py [--quick] [--plot FILE.svg]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

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


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    sizes = [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000]
    seconds = []
    for shards in sizes:
        start = time.perf_counter()
        whole_plan(shards)
        seconds.append(time.perf_counter() - start)
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.loglog(sizes, seconds, marker="o", color="#1f6f8b")
    axes.set_xlabel("shards of 5,000 samples")
    axes.set_ylabel("one of 4,096 ranks' epoch, s")
    axes.grid(color="#e6e6e6")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=Path)
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
    from roclip.checkpoint.checkpoint import Cursor  # loads torch, which the plan does not need

    state = len(json.dumps(asdict(Cursor(10**9, 10**4, 10**7, 10**13, "matched"))))
    measure("plan", f"state, {case}", "bytes", lambda: float(state), 1024.0, 1.0, runs=1)
    if arguments.plot:
        plot(arguments.plot)
