"""Opening a manifest of 1,000,000 shards, packed as ingest packs it, against a budget of 10 s and 2 GiB; and again, when
it was open: what training asks at each epoch.

    python tests/bench/manifest.py [--quick]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench import measure

from roclip.shards import PACK, Manifest, ShardRecord


def make(root: Path, shards: int) -> None:
    manifest = Manifest(root)
    for first in range(0, shards, PACK):
        for number in range(first, first + PACK):
            name, sha256 = f"{number:07d}.tar", f"{number:064x}"
            record = ShardRecord(name, 5000, 10**8, sha256, sha256, 10_000, {"http_404": 4000, "timeout": 1000})
            (manifest.folder / f"{number:07d}.json").write_text(json.dumps(asdict(record)))
        manifest.pack()


def peak_bytes(root: Path) -> float:
    """Peak resident set of a fresh process that opens it, its interpreter and pyarrow included."""
    done = subprocess.run([sys.executable, __file__, "--child", root], capture_output=True, text=True, check=True)
    return float(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        Manifest(arguments.child).records()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        sys.exit()
    shards = 10_000 if arguments.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "manifest").mkdir()
        make(root, shards)
        opened = Manifest(root)
        case = f"{shards:,} shards"
        measure("manifest", f"open, {case}", "s", lambda: Manifest(root).records() and None, 10.0, 1.0, runs=3)
        measure("manifest", f"again, {case}", "s", lambda: opened.records() and None, 10.0, 1.0, runs=3)
        measure("manifest", f"memory, {case}", "bytes", lambda: peak_bytes(root), 2.0**31, 1.0, runs=1)
