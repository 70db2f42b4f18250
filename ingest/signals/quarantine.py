"""Withholds suspected samples from training: which keys of which shards, and a shard's index without them.

Training reads the samples in a shard's index. So the rows are moved from the index to a second parquet of the same form, with
the names of the signals, and the tar stays as it is.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from ingest.signals.suspicion import SIGNALS
from roclip.errors import ConfigError, ShardError
from roclip.storage import content_of

pc: Any = pyarrow.compute  # its functions are made at import, which no type checker sees
SIGNAL = pa.field("signal", pa.string())
"""The extra column of quarantined rows: the names of their signals, comma-separated."""


def check_signals(signals: Sequence[str]) -> None:
    """Raises `ConfigError` for an unknown signal."""
    if unknown := [name for name in signals if name not in SIGNALS]:
        raise ConfigError(
            f"ingest.quarantine: expected any of {', '.join(SIGNALS)}, got {', '.join(unknown)}. Correct the name."
        )


def quarantined(suspicion: Path, signals: Sequence[str], min_score: float = 0.0) -> Iterator[tuple[str, pa.Table]]:
    """The samples that the signals name, shard by shard in order: file name of the tar, and a table of the strings `key` and
    `signal`, with each key once.

    `suspicion` is a `suspicion.parquet`, local or on a store. Memory: its largest row group, and one shard. Raises
    `ConfigError` for an unknown signal, `ShardError` for a parquet that cannot be read.
    """
    check_signals(signals)
    shard, held = "", []
    for name, rows in _runs(suspicion, signals, min_score):
        if name != shard and held:
            yield shard, _by_key(pa.concat_tables(held))
            held = []
        shard = name
        held.append(rows)
    if held:
        yield shard, _by_key(pa.concat_tables(held))


def split_index(index: pa.Table, named: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split a shard's index into the rows without the keys of `named`, and the rows of these keys with `SIGNAL`; both keep
    their order.

    A key that is not in the index is ignored: it was removed before.
    """
    out = pc.is_in(index["key"], value_set=named["key"].combine_chunks())
    kept, dropped = index.filter(pc.invert(out)), index.filter(out)
    at = pc.index_in(dropped["key"], value_set=named["key"].combine_chunks())
    return kept, dropped.append_column(SIGNAL, named["signal"].take(at).cast(SIGNAL.type))


def quarantine_path(root: Path, record_name: str) -> Path:
    """The path of a shard's quarantined rows."""
    return root / f"{Path(record_name).stem}.quarantine.parquet"


def _runs(suspicion: Path, signals: Sequence[str], min_score: float) -> Iterator[tuple[str, pa.Table]]:
    """The named rows, split where the shard changes."""
    try:
        source = suspicion if isinstance(suspicion, Path) else pa.BufferReader(content_of(suspicion))
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(columns=["key", "shard", "signal", "score"]):
                table = pa.Table.from_batches([batch])
                named = pc.is_in(table["signal"], value_set=pa.array(signals, pa.string()))
                table = table.filter(pc.and_(named, pc.greater_equal(table["score"], min_score)))
                for start, stop in _equal_runs(table["shard"].to_pylist()):
                    yield table["shard"][start].as_py(), table.slice(start, stop - start).select(["key", "signal"])
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ShardError(
            f"{suspicion}: expected a suspicion.parquet, got {error}. Delete it and run ingest again."
        ) from error


def _equal_runs(values: list[str]) -> Iterator[tuple[int, int]]:
    start = 0
    for at in range(1, len(values) + 1):
        if at == len(values) or values[at] != values[start]:
            yield start, at
            start = at


def _by_key(rows: pa.Table) -> pa.Table:
    grouped = rows.group_by("key", use_threads=False).aggregate([("signal", "distinct")]).sort_by("key")
    names = [",".join(sorted(each)) for each in grouped["signal_distinct"].to_pylist()]
    return pa.table({"key": grouped["key"], "signal": pa.array(names, pa.string())})
