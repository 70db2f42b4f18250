"""Manifest and shards on an object store: a real S3 protocol over loopback, with errors, hanging and short answers."""

import time

import fsspec
import pytest
import s3fs
import torch
from ends import KILLED_RUN, STEPS, assert_same_end, logged, until
from forked import trainings_of
from kit import preset, scene_samples, tiny_shards, write_shard
from s3 import s3_server

from roclip import storage
from roclip.data.cache import ShardCache, ShardUnreadableError
from roclip.data.reader import BadSampleError, ShardReader
from roclip.data.shards import Manifest
from roclip.data.stream import Stream, StreamSettings, take_snapshot
from roclip.metrics.registry import read_metrics
from roclip.storage import place

SHARDS = 3
AWAY_S = 10.0
"""Longer than a request's time-out and the first tries after it."""


@pytest.fixture
def local(tmp_path):
    for number in range(SHARDS):
        write_shard(tmp_path / "shards", number, scene_samples(8 * number, 8))
    return tmp_path / "shards"


@pytest.fixture
def server(local, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        s3fs.S3FileSystem(**server.options).put(str(local), "bucket/shards", recursive=True)
        server.seen.clear()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def remote(server):
    return Manifest("s3://bucket/shards")


def batches(root, cache=None, **changes):
    stream = Stream(
        root,
        StreamSettings(64, 6, seed=0, streams=2, shuffle_buffer=4, **changes),
        tokenize=lambda captions: torch.tensor([[len(caption)] for caption in captions]),
        cache=cache,
    )
    return list(stream.epoch(take_snapshot(Manifest(root)), 1))


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and a.bad == b.bad == ()
        for a, b in zip(some, others, strict=True)
    )


def test_manifest_on_a_store_is_the_local_one(local, remote):
    assert remote.records() == Manifest(local).records()
    assert Manifest("s3://bucket/nothing").records() == ()
    assert remote.summary is None
    remote.finish({"urls": 24})
    assert Manifest("s3://bucket/shards").summary == {"urls": 24}
    remote.reopen()
    assert remote.summary is None


def test_a_shard_published_by_another_process_is_seen(local, remote, server):
    before = remote.records()
    record = write_shard(local, SHARDS, scene_samples(100, 4))
    body = (local / "manifest" / "00003.json").read_bytes()
    s3fs.S3FileSystem(**server.options, skip_instance_cache=True).pipe("bucket/shards/manifest/00003.json", body)
    assert remote.records() == (*before, record)


def test_records_are_packed_on_a_store(remote):
    before = remote.records()
    remote.pack(at_least=SHARDS)
    names = sorted(path.name for path in remote.folder.glob("*"))
    assert len(names) == 1
    assert names[0].startswith("pack-")
    assert Manifest("s3://bucket/shards").records() == before


@pytest.mark.parametrize("cached", [True, False])
def test_batches_from_a_store_are_those_from_the_disk(local, remote, tmp_path, cached):
    cache = ShardCache(tmp_path / "cache", 10**9) if cached else None
    assert same(batches(remote.root, cache=cache), batches(local))


def test_each_shard_is_fetched_once_and_the_cache_keeps_its_bound(remote, server, tmp_path):
    records = remote.records()
    cache = ShardCache(tmp_path / "cache", 2 * records[0].bytes + 1)
    for record in (*records[:2], *records[:2]):
        assert cache.get(remote.root, record).stat().st_size == record.bytes
    fetched = {path: times for (method, path), times in server.seen.items() if method == "GET" and ".tar" in path}
    assert set(fetched) == {"/bucket/shards/00000.tar", "/bucket/shards/00001.tar"}
    assert max(fetched.values()) == 1
    cache.get(remote.root, records[2])  # the one used longest ago makes room
    assert {path.stem for path in cache.folder.glob("*")} == {records[1].sha256, records[2].sha256}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error", "hang", "short"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_store_that_fails_now_and_then_gives_the_same_batches(local, server, remote, tmp_path, fault, cached):
    server.fault = lambda method, path, number: (
        fault if method == "GET" and path.endswith(("0000.tar", "0001.json")) and number % 8 == 0 else None
    )
    cache = ShardCache(tmp_path / "cache", 10**9) if cached else None
    assert same(batches(remote.root, cache=cache), batches(local))


def test_a_shard_that_cannot_be_had_is_counted_by_reason_and_asked_for_only_once(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    server.fault = lambda method, path, number: "error" if method == "GET" and path.endswith("00000.tar") else None
    bad = [reason for batch in batches(remote.root, cache=ShardCache(tmp_path / "c", 10**9)) for reason in batch.bad]
    assert {reason for _, reason in bad} == {"shard_not_readable"}
    assert len(bad) == 8
    asked = server.seen["GET", "/bucket/shards/00000.tar"]
    reader = ShardReader(remote.root, remote.records()[0], ShardCache(tmp_path / "c", 10**9))
    for sample in range(3):
        with pytest.raises(BadSampleError, match="shard_not_readable"):
            reader.read(sample)
    assert server.seen["GET", "/bucket/shards/00000.tar"] <= 2 * asked


def test_a_shard_that_vanished_or_was_changed_is_told(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    first, second, _ = remote.records()
    store = s3fs.S3FileSystem(**server.options)
    store.rm("bucket/shards/00000.tar")
    content = bytearray(store.cat("bucket/shards/00001.tar"))
    content[600] ^= 1
    store.pipe("bucket/shards/00001.tar", bytes(content))
    cache = ShardCache(tmp_path / "cache", 10**9)
    with pytest.raises(ShardUnreadableError, match="shard_not_there"):
        cache.get(remote.root, first)
    with pytest.raises(ShardUnreadableError, match="shard_sha256_differs"):
        cache.get(remote.root, second)
    assert list(cache.folder.iterdir()) == []
    with pytest.raises(BadSampleError, match="shard_not_there"):
        ShardReader(remote.root, first).read(0)


def test_place_is_a_path_here_and_a_store_elsewhere(tmp_path):
    assert place(str(tmp_path)) == tmp_path
    assert place(tmp_path) is tmp_path
    assert str(place("memory://a/b") / "c") == "memory://a/b/c"


def options(server):
    """The environment of a process that uses the store."""
    return {f"FSSPEC_S3_{key.upper()}": server.options[key] for key in ("key", "secret", "endpoint_url")}


@pytest.mark.slow
def test_a_training_from_a_store_is_the_training_from_the_disk(local, server, tmp_path):
    text = """
name: tiny
arms: [roclip]
data: {{shards: {folder}/shards, streams: 2, shuffle_buffer: 8, cache_dir: {folder}/cache}}
model: {{name: tiny}}
ingest: {{image_size: 64}}
pool: {{size: 16, neighbours: 4}}
train: {{epochs: 2, global_batch_size: 8, log_every_steps: 1}}
"""
    config = preset(tmp_path, text.format(folder=tmp_path))
    losses = []
    with trainings_of(config) as trainings:
        for number, where in enumerate((local, "s3://bucket/shards")):
            run = tmp_path / f"run{number}"
            code = trainings.end(trainings.train(run, f"data.shards={where}", **options(server)))
            assert code == 0, trainings.said.read_text()
            losses.append([row["loss"] for row in read_metrics(run / "roclip" / "metrics.jsonl")])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "cache").iterdir())) == SHARDS


@pytest.mark.slow
def test_a_training_waits_for_a_store_that_is_away_and_ends_with_the_same_numbers(server, undisturbed, tmp_path):
    run, objects = tmp_path / "run", s3fs.S3FileSystem(**server.options)
    config = preset(tmp_path, KILLED_RUN.format(shards="s3://bucket/tiny"))
    objects.put(str(tiny_shards(tmp_path / "tiny")), "bucket/tiny", recursive=True)
    where = ("data.cache_bytes=0", "train.checkpoint_store=s3://bucket/kept")
    with trainings_of(config) as trainings:
        training = trainings.train(run, *where, **options(server))
        until(lambda: logged(run) >= 7, trainings.last_words)
        server.fault = lambda method, path, number: "error"
        time.sleep(AWAY_S)
        assert logged(run) < STEPS, "it did not need the store"
        server.fault = lambda method, path, number: None
        assert trainings.end(training) == 0, trainings.said.read_text()
    assert_same_end(undisturbed(1), run)
    kept = objects.cat("bucket/kept/run/roclip/LATEST").decode()
    assert kept.split()[-1] == (run / "roclip" / "checkpoints" / "LATEST").read_text().strip()
