"""The lease: one holder, who is taken over only when it is silent or gone."""

import fcntl
import json
import multiprocessing
import os
import threading
import time

import fsspec
import pytest
import s3fs
from ends import until
from ingesting import hold_lease
from s3 import s3_server

from ingest.folder import lease as leases
from ingest.folder.lease import Lease, put_new, write_new
from roclip.errors import RunLockedError
from roclip.storage import content_of, names_in, place


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "_SETTLE_S", 0.05)
    if request.param == "local":
        yield tmp_path
        return
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        yield place("s3://bucket/shards")
    s3fs.S3FileSystem.clear_instance_cache()


def fall_silent(lease):
    """As if its process had been stopped."""
    lease._ended.set()
    lease._heartbeat_thread.join()


def test_second_holder_is_told_who_the_first_is(root):
    with Lease(root):
        with pytest.raises(
            RunLockedError, match=rf"process {os.getpid()} on .* since 20.*last heard.*run this again in"
        ):
            Lease(root).__enter__()
        with pytest.raises(RunLockedError):
            Lease(root).__enter__()
    with Lease(root) as after:  # it was given back
        after.check()


def test_silent_holder_is_taken_over_and_finds_out(root):
    with Lease(root, expiry_s=0.2) as first:
        fall_silent(first)
        time.sleep(0.3)
        with Lease(root) as second:
            second.token.check()
            with pytest.raises(RunLockedError, match="expected to hold lease 1, got 2"):
                first.token.check()
            with pytest.raises(RunLockedError):
                first._write_heartbeat()
    files = [name for name in names_in(root / leases.FOLDER) if name.endswith(".json")]
    assert max(files) == "00000002.json"


def test_holder_that_beats_is_not_taken_over(root):
    with Lease(root, expiry_s=1.5):
        time.sleep(2)
        with pytest.raises(RunLockedError):
            Lease(root, expiry_s=1.5).__enter__()


def test_killed_holder_is_taken_over_at_once(tmp_path):
    holder = multiprocessing.get_context("spawn").Process(target=hold_lease, args=(tmp_path,))
    holder.start()
    until(
        lambda: names_in(tmp_path / leases.FOLDER), lambda: "" if holder.is_alive() else f"exit code {holder.exitcode}"
    )
    with pytest.raises(RunLockedError, match=f"process {holder.pid}"):
        Lease(tmp_path).__enter__()
    holder.kill()
    holder.join()
    with Lease(tmp_path) as lease:
        assert lease.token.generation == 2


def test_beat_needs_no_lock_so_a_holder_that_stops_in_mid_beat_keeps_nothing(tmp_path):
    with Lease(tmp_path) as lease, leases._lock(tmp_path, fcntl.LOCK_EX):
        beat = threading.Thread(target=lease._write_heartbeat, daemon=True)
        beat.start()
        beat.join(10)
        assert not beat.is_alive()


def test_holder_that_stops_while_it_publishes_is_named_and_waited_for_no_longer_than_told(tmp_path):
    with Lease(tmp_path, expiry_s=0.2) as first:
        fall_silent(first)
        time.sleep(0.3)
        with first.token.publishing(), pytest.raises(RunLockedError, match=r"publishing to be done within 0 s.*fuser"):
            Lease(tmp_path, expiry_s=0.2).__enter__()
        with Lease(tmp_path) as second:
            assert second.token.generation == 2


def test_silent_holder_of_another_machine_is_waited_for(tmp_path):
    with Lease(tmp_path):
        pass
    path = tmp_path / leases.FOLDER / "00000001.json"
    other = {**json.loads(path.read_text()), "machine": "elsewhere", "released": False, "beat_s": time.time() - 50}
    path.write_text(json.dumps(other))
    with pytest.raises(RunLockedError, match=r"run this again in (\d|10) s"):
        Lease(tmp_path).__enter__()
    path.write_text(json.dumps({**other, "beat_s": time.time() - 61}))
    with Lease(tmp_path):
        pass


def test_one_of_many_gets_it(root):
    got, refused, ready, out = [], [], threading.Barrier(5), threading.Event()

    def try_it():
        ready.wait()
        try:
            with Lease(root):
                got.append(1)
                out.wait()
        except RunLockedError:
            refused.append(1)

    threads = [threading.Thread(target=try_it) for _ in range(5)]
    for thread in threads:
        thread.start()
    while len(got) + len(refused) < 5:
        time.sleep(0.01)
    out.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)


def test_write_new_never_replaces(root):
    path = root / "x" / "name.json"
    assert write_new(path, "one")
    assert not write_new(path, "two")
    assert content_of(path) == b"one"


@pytest.mark.parametrize("root", ["s3"], indirect=True)
def test_put_new_never_replaces(root, tmp_path_factory):
    source = tmp_path_factory.mktemp("put") / "tar"
    source.write_bytes(b"one")
    assert put_new(source, root / "a.tar")
    source.write_bytes(b"two")
    assert not put_new(source, root / "a.tar")
    assert content_of(root / "a.tar") == b"one"
