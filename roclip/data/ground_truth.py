"""The ground truth of the poisons, for evaluation only: which samples of a run are poisoned.

`poison.parquet` has one row per poison. A run that poisoned its own URL list keeps it in `origin/`; shards that `roclip
poison` wrote have it beside their manifest. This module reads files only, without importing attacks or oracle.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from roclip.data.shards import Manifest, read_index, sample_ids
from roclip.data.tar_sources import shards_root
from roclip.storage import write_atomic

TRUTH = "poison.parquet"
TRUTH_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # the sample's id in training (its key as a number); in a URL list the row
        ("key", pa.string()),
        ("attack", pa.string()),
        ("group", pa.int32()),  # rows of one attack and group share an image
        ("target_label", pa.string()),
        ("source_label", pa.string()),
        ("trigger_box", pa.list_(pa.int32())),  # left, top, right, bottom in pixels; null without a trigger
        ("caption", pa.string()),
    ]
)


def write_truth(path: Path, poisons: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of `TRUTH_SCHEMA`, ordered by id; a missing `id` is the key as a number."""
    rows = [{"id": int(row["key"]), **row} for row in poisons]
    write_parquet(path, pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]), schema=TRUTH_SCHEMA))


def poisoned_samples(run: Path) -> pa.Table:
    """Return the poisons in the shards of a run: id (int64), attack, target_label, group, ordered by id.

    Empty if nothing is poisoned or there is no ground truth.
    """
    shards = run / "shards"
    if (run / "config.yaml").exists():
        settings = OmegaConf.load(run / "config.yaml")  # reads one key only, since the run may be of another version
        shards = shards_root(OmegaConf.select(settings, "data.shards") or "", run)
    columns = ["attack", "target_label", "group"]
    schema = pa.schema([TRUTH_SCHEMA.field("id"), *(TRUTH_SCHEMA.field(name) for name in columns)])
    truth = next((path for path in (run / "origin" / TRUTH, shards / TRUTH) if path.exists()), None)
    if truth is None:
        return schema.empty_table()
    rows = pq.read_table(pa.BufferReader(truth.read_bytes()), columns=["key", *columns]).to_pylist()
    ids: dict[str, int] = {}
    for record in Manifest(shards).records():
        index = read_index(shards, record.name, ["key", "id"])
        ids.update(zip(index["key"].to_pylist(), sample_ids(index), strict=True))
    arrived = [{"id": ids[row["key"]], **row} for row in rows if row["key"] in ids]
    return pa.Table.from_pylist(sorted(arrived, key=lambda row: row["id"]), schema=schema)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table atomically."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())
