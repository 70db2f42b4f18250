"""What a training came to suspect: its gate's scores, ranked, as a file for people and for the oracle check."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from roclip.data.ground_truth import write_parquet
from roclip.data.shards import Manifest, read_index, sample_ids

SUSPECTS_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),  # 1 is the most suspicious
        ("score", pa.float64()),  # suspicion from 0 to 1 at the last visit
        ("id", pa.int64()),
        ("key", pa.string()),
        ("shard", pa.string()),
    ]
)


def write_suspects(path: Path, scores: Mapping[int, float], manifest: Manifest) -> None:
    """Write every sample that the gate scored (`AgreementGate.scores`), most suspicious first, with its key and shard."""
    where = {}
    for record in manifest.records():
        index = read_index(manifest.root, record.name, ["key", "id"])
        for sample, key in zip(sample_ids(index), index["key"].to_pylist(), strict=True):
            where[sample] = (key, record.name)
    ranked = sorted((-score, sample) for sample, score in scores.items() if sample in where)
    rows = [
        {"rank": rank, "score": -score, "id": sample, "key": where[sample][0], "shard": where[sample][1]}
        for rank, (score, sample) in enumerate(ranked, 1)
    ]
    write_parquet(path, pa.Table.from_pylist(rows, schema=SUSPECTS_SCHEMA))
