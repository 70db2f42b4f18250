"""Opening a manifest of 1,000,000 shards, packed as ingest packs it, against a budget of 10 s and 2 GiB; and again, when
it was open: what training asks at each epoch.

    python tests/bench/manifest.py [--quick]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from bench import measure

from roclip.data.shards import PACK, Manifest, ShardRecord


def make(root: Path, shards: int) -> None:
    """One pack that `Manifest` made, and the others as it would have made them."""
    manifest = Manifest(root)
    for number in range(PACK):
        sha256 = f"{number:064x}"
        record = ShardRecord(
            f"{number:07d}.tar", 5000, 10**8, sha256, sha256, 10_000, {"http_404": 4000, "timeout": 1000}
        )
        manifest.publish(record)
    manifest.pack()
    (path,) = manifest.folder.iterdir()
    table = pq.read_table(path)
    for first in range(PACK, shards, PACK):
        names = pa.array([f"{number:07d}.tar" for number in range(first, first + PACK)])
        pq.write_table(table.set_column(0, "name", names), manifest.folder / f"pack-{first:016x}.parquet")


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
        make(root, shards)
        opened = Manifest(root)
        case = f"{shards:,} shards"
        measure("manifest", f"open, {case}", "s", lambda: Manifest(root).records() and None, 10.0, 1.0, runs=3)
        measure("manifest", f"again, {case}", "s", lambda: opened.records() and None, 10.0, 1.0, runs=3)
        measure("manifest", f"memory, {case}", "bytes", lambda: peak_bytes(root), 2.0**31, 1.0, runs=1)
