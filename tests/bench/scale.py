"""Training on 8 to 1,024 GPUs: what a step takes, and which part of it is the bottleneck, from what is measured here.

    python tests/bench/scale.py --measure --out FILE.json [--device cuda|cpu] [--quick]    the parts, on this machine
    torchrun --nproc-per-node=2 tests/bench/scale_ranks.py --out FILE.json                 the model against two ranks
    python tests/bench/scale.py --merge GPU.json RANKS.json --out MEASURED.json            what is kept in the repository
    python tests/bench/scale.py [--plot FILE.svg]                                          tables, simulations, plot

The model is `tests/support/scale_model.py` with what it assumes, the simulations `tests/support/scale_sim.py`.
"""

import argparse
import json
import sys
from pathlib import Path

HOME = Path(__file__).parents[2]
sys.path.insert(0, str(HOME / "tests" / "support"))
MEASURED = HOME / "configs" / "experiments" / "results" / "scale-measured.json"


def measure_here(device: str, quick: bool, out: Path) -> int:
    from scale_measure import measure

    found = measure(device, quick, lambda found: _write(out, found))
    return 1 if found["failed"] else 0


def report(measured: Path, plot: Path | None) -> None:
    import scale_report
    from scale_model import Measured

    found = json.loads(measured.read_text())
    given = Measured(found["parts"])
    titles = {
        "A mean step, half of them matched, 256 pairs a GPU, 400 Gb/s a GPU": scale_report.step_table,
        "A global batch of 32,768 on more GPUs": scale_report.fixed_batch,
        "Where a part becomes the bottleneck": scale_report.points,
        "Memory of the pool on a GPU": scale_report.memory,
        "What means hide": scale_report.simulations,
        "400 million images that are still arriving, ViT-B/16": scale_report.arrivals,
    }
    print(f"Measured on {given.found['machine']}\n")
    for title, text in titles.items():
        print(f"{title}\n\n{text(given)}\n")
    if "ranks" in found:
        print(f"Two gloo ranks, predicted and measured\n\n{scale_report.checked(found['ranks'])}\n")
    if plot:
        scale_report.plot(given, plot)


def _write(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--merge", nargs=2, type=Path, metavar=("PARTS.json", "RANKS.json"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    given = parser.parse_args()
    if (given.measure or given.merge) and not given.out:
        parser.error("--measure and --merge need --out FILE.json")
    if given.measure:
        return measure_here(given.device, given.quick, given.out)
    if given.merge:
        parts, ranks = (json.loads(path.read_text()) for path in given.merge)
        _write(given.out, {"parts": parts, "ranks": ranks})
        return 0
    report(given.measured, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
