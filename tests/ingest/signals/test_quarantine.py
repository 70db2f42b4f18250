"""What is quarantined leaves the index, and nothing else changes."""

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import scene_samples
from sealed import put_parquet, seal

from ingest.shard.verify import INDEX_SCHEMA
from ingest.signals.quarantine import check_signals, quarantine_path, quarantined, split_index
from ingest.signals.suspect_groups import SCHEMA, SUSPICION
from ingest.signals.suspicion import SIGNALS
from roclip.data.reader import ShardReader
from roclip.data.shards import Manifest, index_path, read_index
from roclip.errors import ConfigError, ShardError


def suspicion(path, rows):
    full = [
        {
            **dict.fromkeys(SCHEMA.names),
            "shard": f"{int(key) // 10:05d}.tar",
            "key": key,
            "signal": signal,
            "score": score,
        }
        for key, signal, score in rows
    ]
    put_parquet(path, pa.Table.from_pylist(full, schema=SCHEMA))
    return path


def index_of(keys):
    zeros = [pa.array(range(len(keys)), pa.int64())] * 4
    return pa.Table.from_arrays([pa.array(keys, pa.string()), *zeros], schema=INDEX_SCHEMA)


ROWS = [
    ("000001", "shared_patch", 0.9),
    ("000001", "hash_mismatch", 0.5),
    ("000003", "host_concentration", 0.9),
    ("000011", "shared_patch", 0.2),
    ("000021", "shared_patch", 0.8),
]


def test_named_signals_give_their_keys_shard_by_shard(tmp_path):
    path = suspicion(tmp_path / SUSPICION, ROWS)
    found = {shard: table.to_pylist() for shard, table in quarantined(path, ["shared_patch", "hash_mismatch"])}
    assert found == {
        "00000.tar": [{"key": "000001", "signal": "hash_mismatch,shared_patch"}],
        "00001.tar": [{"key": "000011", "signal": "shared_patch"}],
        "00002.tar": [{"key": "000021", "signal": "shared_patch"}],
    }
    assert [shard for shard, _ in quarantined(path, ["shared_patch"], min_score=0.5)] == ["00000.tar", "00002.tar"]
    assert list(quarantined(path, [])) == []


def test_a_suspicion_on_a_store_is_read(tmp_path):
    path = suspicion(tmp_path / SUSPICION, ROWS)
    store = fsspec.filesystem("memory")
    store.pipe_file(f"/q/{SUSPICION}", path.read_bytes())
    try:
        from roclip.storage import place

        there = quarantined(place("memory://q") / SUSPICION, ["host_concentration"])
        assert [(shard, table["key"].to_pylist()) for shard, table in there] == [("00000.tar", ["000003"])]
    finally:
        store.rm("/q", recursive=True)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 50), max_size=40), st.sets(st.integers(0, 60), max_size=40))
def test_an_index_is_split_into_what_stays_and_what_goes(keys, named):
    index = index_of([f"{key:06d}" for key in sorted(keys)])
    table = pa.table(
        {
            "key": pa.chunked_array([pa.array([f"{key:06d}" for key in sorted(named)], pa.string())]),
            "signal": pa.chunked_array([pa.array([f"signal {key}" for key in sorted(named)], pa.string())]),
        }
    )
    kept, dropped = split_index(index, table)
    assert kept.schema == INDEX_SCHEMA
    assert dropped.schema.names == [*INDEX_SCHEMA.names, "signal"]
    assert kept["key"].to_pylist() == [f"{key:06d}" for key in sorted(keys - named)]
    assert dropped["key"].to_pylist() == [f"{key:06d}" for key in sorted(keys & named)]
    assert dropped["signal"].to_pylist() == [f"signal {key}" for key in sorted(keys & named)]


def test_training_reads_the_rest_and_the_quarantined_stay_readable(tmp_path):
    root = tmp_path / "shards"
    rows = [
        {"url": f"http://a.example/{n}", "image": image, "caption": text}
        for n, (image, text) in enumerate(scene_samples(0, 6))
    ]
    record = seal(root, 0, rows, 10)
    path = suspicion(tmp_path / SUSPICION, ROWS[:3])
    whole = {reader.key(n): reader.read(n) for reader in [ShardReader(root, record)] for n in range(6)}
    ((shard, named),) = quarantined(path, ["shared_patch"])
    kept, dropped = split_index(read_index(root, shard), named)
    pq.write_table(dropped, quarantine_path(root, shard))
    pq.write_table(kept, index_path(root, shard))
    reader = ShardReader(root, Manifest(root).records()[0])
    assert {reader.key(n): reader.read(n) for n in range(len(kept))} == {
        key: pair for key, pair in whole.items() if key != "000001"
    }
    pq.write_table(pq.read_table(quarantine_path(root, shard)), index_path(root, shard))  # read it as an index
    reader = ShardReader(root, record)
    assert (reader.key(0), reader.read(0)) == ("000001", whole["000001"])


def test_an_unknown_signal_is_an_error_that_names_the_known_ones(tmp_path):
    check_signals(list(SIGNALS))
    with pytest.raises(ConfigError, match=r"shared_patch.*got nonsense"):
        list(quarantined(suspicion(tmp_path / SUSPICION, ROWS), ["nonsense"]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 100])
def test_what_is_no_suspicion_is_an_error(tmp_path, content):
    (tmp_path / SUSPICION).write_bytes(content)
    with pytest.raises(ShardError, match=SUSPICION):
        list(quarantined(tmp_path / SUSPICION, ["shared_patch"]))
    with pytest.raises(ShardError, match=SUSPICION):
        list(quarantined(tmp_path / "none" / SUSPICION, ["shared_patch"]))
