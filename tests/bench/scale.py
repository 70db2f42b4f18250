"""Training at 8 to 1,024 GPUs: what a step takes, and which part of it is the bottleneck, from what is measured here.

python tests/bench/scale.py --measure --out FILE.json [--device cuda|cpu] [--quick]     measure this machine
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.measure:
        from scale_measure import measure

        found = measure(
            given.device, given.quick, lambda found: given.out.write_text(json.dumps(found, indent=1) + "\n") and None
        )
        return 1 if found["failed"] else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
