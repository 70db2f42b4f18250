"""A large ingest without images, for memory: `python big_ingest.py FOLDER ROWS make` writes its parquets and indexes, and
`python big_ingest.py FOLDER ROWS duplicates|suspect|drift` scans it and prints seconds and peak RSS in MiB."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

PER_SHARD = 10_000
_WORDS = 20_000


def make(root: Path, number: int) -> None:
    """Shards with a few duplicates of each kind; words as often as in a language (Zipf)."""
    from sealed import put_parquet

    from ingest.shard.verify import INDEX_SCHEMA
    from roclip.data.shards import Manifest, ShardRecord, index_path, sample_key

    vocabulary = np.array([f"word{n:x}" for n in range(_WORDS)])
    for shard in range(number // PER_SHARD):
        rng = np.random.default_rng(shard)
        drawn = vocabulary[np.minimum(rng.zipf(1.3, (PER_SHARD, 9)) - 1, _WORDS - 1)]
        url = rng.integers(0, 20 * number, PER_SHARD)
        keys = pa.array([sample_key(shard * PER_SHARD + n, PER_SHARD) for n in range(PER_SHARD)])
        table = pa.table(
            {
                "url": pa.array([f"http://host{n % 50_000}.example/{n}.jpg" for n in url.tolist()]),
                "caption": pa.array([" ".join(words) for words in drawn.tolist()]),
                "key": keys,
                "status": pa.array(["success"] * PER_SHARD),
                "error_message": pa.nulls(PER_SHARD, pa.string()),
                "sha256": pa.array([f"{n:016x}{n:048x}" for n in rng.integers(0, 2**44, PER_SHARD).tolist()]),
                "phash": pa.array(rng.integers(0, 2**64, PER_SHARD, dtype=np.uint64)),
            }
        )
        name = f"{shard:05d}.tar"
        put_parquet(root / f"{shard:05d}.parquet", table)
        zeros = pa.array(np.zeros(PER_SHARD, np.int64))
        put_parquet(
            index_path(root, name), pa.Table.from_arrays([keys, zeros, zeros, zeros, zeros], schema=INDEX_SCHEMA)
        )
        Manifest(root).publish(ShardRecord(name, PER_SHARD, 0, "0" * 64, "0" * 64, PER_SHARD))


def main() -> None:
    root, number, act = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if act == "make":
        make(root, number)
        return
    from ingest.signals.drift import find_drift
    from ingest.signals.duplicates import find_duplicates
    from ingest.signals.suspicion import find_suspects

    before, started, work = _peak_mib(), time.monotonic(), root.parent / "work"
    if act == "duplicates":
        rows = find_duplicates(root, work).samples
    elif act == "suspect":
        rows = find_suspects(root, work, images=0).samples
    else:
        find_drift(root, root, work)
        rows = number
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"seconds": seconds, "before_mib": before, "peak_mib": _peak_mib(), "rows": rows}))


def _peak_mib() -> float:
    """Of this program alone: `ru_maxrss` would begin with what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
