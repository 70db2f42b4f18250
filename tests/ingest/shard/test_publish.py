import hashlib
import os
import tarfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.folder import lease as leases
from ingest.folder.lease import Lease
from ingest.shard import publish as publishing
from ingest.shard.fetch import FetchedShard
from ingest.shard.publish import Seal, publish
from ingest.shard.verify import verify
from roclip.data.shards import HELD, Manifest, index_path
from roclip.errors import RunLockedError
from roclip.storage import names_in, place, sha256_file


def _fetched(root, jpeg, attempt):
    """A shard of one sample in a folder of unfinished work; every attempt has other bytes."""
    work = root / "_work" / str(attempt)
    work.mkdir(parents=True)
    (work / "image").write_bytes(jpeg(attempt))
    (work / "caption").write_text("a cat")
    with tarfile.open(work / "00003.tar", "w") as tar:
        tar.add(work / "image", "00003.jpg")
        tar.add(work / "caption", "00003.txt")
    row = {"key": ["00003"], "caption": ["a cat"], "status": ["success"], "error_message": [""]}
    pq.write_table(pa.table(row), work / "00003.parquet")
    return FetchedShard(work / "00003.tar", work / "00003.parquet", 1)


def _check(root, record):
    assert Manifest(root).records() == (record,)
    assert record.sha256 == sha256_file(root / record.name)
    assert record.index_sha256 == sha256_file(index_path(root, record.name))
    assert record.bytes == (root / record.name).stat().st_size
    assert (record.samples, record.urls, record.failed) == (1, 1, {})
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == [
        "00003.index.parquet",
        "00003.parquet",
        "00003.tar",
    ]


@pytest.mark.parametrize("steps", range(4))
def test_shard_exists_only_after_the_last_step(tmp_path, jpeg, monkeypatch, steps):
    done = []

    def replace(*paths, real=os.replace):
        if len(done) == steps:
            raise KeyboardInterrupt  # stands for the kill: nothing after this happens
        done.append(paths)
        real(*paths)

    first = _fetched(tmp_path, jpeg, 0)
    report = verify(first.tar, first.parquet)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if steps == 3:
            patch.setattr(publishing, "write_new", replace)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, first, report)
    assert len(done) == steps
    assert Manifest(tmp_path).records() == ()
    again = _fetched(tmp_path, jpeg, 1)
    _check(tmp_path, publish(tmp_path, again, verify(again.tar, again.parquet)))


@pytest.mark.parametrize("steps", range(4))
def test_shard_exists_on_a_store_only_after_the_last_step(tmp_path, jpeg, monkeypatch, steps):
    root, done = place("memory://shards"), []

    def put(*paths, real=publishing.put_new):
        if len(done) == min(steps, 3):
            raise KeyboardInterrupt
        done.append(paths)
        return real(*paths)

    first = _fetched(tmp_path, jpeg, 0)
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "put_new", put)
        if steps == 3:
            patch.setattr(publishing, "write_new", put)
        with pytest.raises(KeyboardInterrupt):
            publish(root, first, verify(first.tar, first.parquet))
    assert len(done) == steps
    assert Manifest(root).records() == ()
    again = _fetched(tmp_path, jpeg, 1)
    record = publish(root, again, verify(again.tar, again.parquet))
    assert Manifest(root).records() == (record,)
    assert hashlib.sha256((root / record.name).read_bytes()).hexdigest() == record.sha256
    assert sorted(names_in(root)) == ["00003.index.parquet", "00003.parquet", "00003.tar", "manifest"]
    root.fs.rm("/shards", recursive=True)


def test_sealed_shard_stays_when_it_is_published_again(tmp_path, jpeg):
    first = _fetched(tmp_path, jpeg, 0)
    record = publish(tmp_path, first, verify(first.tar, first.parquet))
    _check(tmp_path, record)
    again = _fetched(tmp_path, jpeg, 1)
    assert publish(tmp_path, again, verify(again.tar, again.parquet)) == record
    _check(tmp_path, record)


def _fall_silent(lease):
    lease._ended.set()
    lease._heartbeat_thread.join()
    time.sleep(0.2)


def test_who_has_lost_the_lease_publishes_nothing(tmp_path, jpeg):
    first, again = _fetched(tmp_path, jpeg, 0), _fetched(tmp_path, jpeg, 1)
    with Lease(tmp_path, expiry_s=0.1) as stopped:
        _fall_silent(stopped)
        with Lease(tmp_path) as now:
            record = publish(tmp_path, again, verify(again.tar, again.parquet), Seal(token=now.token))
        with pytest.raises(RunLockedError, match="another ingest took over"):
            publish(tmp_path, first, verify(first.tar, first.parquet), Seal(token=stopped.token))
    _check(tmp_path, record)


def test_upload_that_ends_after_somebody_took_over_replaces_nothing(tmp_path, jpeg, monkeypatch):
    root = place("memory://taken")
    monkeypatch.setattr(leases, "_SETTLE_S", 0)
    slow, fast = _fetched(tmp_path, jpeg, 0), _fetched(tmp_path, jpeg, 1)
    records = []

    def put(source, target, real=publishing.put_new):
        if source == slow.tar and not records:  # meanwhile another ingest seals this shard
            with Lease(root) as now:
                records.append(publish(root, fast, verify(fast.tar, fast.parquet), Seal(token=now.token)))
        return real(source, target)

    monkeypatch.setattr(publishing, "put_new", put)
    with Lease(root, expiry_s=0.1) as stopped:
        _fall_silent(stopped)
        with pytest.raises(RunLockedError):
            publish(root, slow, verify(slow.tar, slow.parquet), Seal(token=stopped.token))
    assert Manifest(root).records() == tuple(records)
    assert hashlib.sha256((root / "00003.tar").read_bytes()).hexdigest() == records[0].sha256
    root.fs.rm("/taken", recursive=True)


def test_held_shard_is_sealed_and_not_in_the_manifest(tmp_path, jpeg):
    first, again = _fetched(tmp_path, jpeg, 0), _fetched(tmp_path, jpeg, 1)
    record = publish(tmp_path, first, verify(first.tar, first.parquet), Seal("rows", {"timeout": 1}, held=True))
    assert Manifest(tmp_path).records() == ()
    assert Manifest(tmp_path, HELD).records() == (record,)
    assert (record.rows_sha256, record.retried) == ("rows", {"timeout": 1})
    assert publish(tmp_path, again, verify(again.tar, again.parquet)) == record
