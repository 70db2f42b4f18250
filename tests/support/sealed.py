"""Sealed shards with the parquet that ingest writes beside them, whose rows a test chooses; images only where it gives some."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from kit import write_shard

from ingest.shard.verify import INDEX_SCHEMA
from roclip.data.shards import Manifest, ShardRecord, index_path, sample_key
from roclip.storage import write_atomic

SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.uint64()),
        ("flags", pa.string()),
    ]
)
PER_SHARD = 1000


def seal(root: Path, number: int, rows: Iterable[Mapping[str, Any]], per_shard: int = PER_SHARD) -> ShardRecord:
    """One shard: a row is a sample unless it has another status than success. With `image` there is a tar, too."""
    rows = [
        {"status": "success", "key": sample_key(number * per_shard + place, per_shard), **row}
        for place, row in enumerate(rows)
    ]
    good = [row for row in rows if row["status"] == "success"]
    name = f"{number:05d}.tar"
    if any("image" in row for row in rows):
        assert len(good) == len(rows), "the writer of tars numbers what it is given"
        for row in rows:
            row.setdefault("sha256", hashlib.sha256(row["image"]).hexdigest())
        record = write_shard(root, number, [(row["image"], row["caption"]) for row in rows], per_shard)
    else:
        keys = [row["key"] for row in good]
        columns = [
            pa.array(keys, pa.string()),
            *(pa.array([0] * len(keys), pa.int64()) for _ in INDEX_SCHEMA.names[1:]),
        ]
        put_parquet(index_path(root, name), pa.Table.from_arrays(columns, schema=INDEX_SCHEMA))
        record = ShardRecord(name, len(good), 0, "0" * 64, "0" * 64, len(rows))
        Manifest(root).publish(record)
    table = pa.Table.from_pylist([{column: row.get(column) for column in SCHEMA.names} for row in rows], schema=SCHEMA)
    put_parquet(root / f"{number:05d}.parquet", table)
    return record


def put_parquet(path: Path, table: pa.Table) -> None:
    """Write a table, here or on a store."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())


def seal_all(root: Path, rows: list[dict[str, Any]], per_shard: int = PER_SHARD) -> Path:
    """Rows cut into shards."""
    for number, start in enumerate(range(0, max(1, len(rows)), per_shard)):
        seal(root, number, rows[start : start + per_shard], per_shard)
    return root
