"""Ingests whose workers, driver, store or node are killed at any moment: each good URL is there once in the end."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import random
import signal
import threading
import time

import ends
import fsspec
import psutil
import pyarrow.parquet as pq
import pytest
import s3fs
from ingesting import config, drive, good_captions, sealed_captions, write_corpus
from ray.cluster_utils import Cluster
from s3 import s3_server

from ingest.origin import Origin
from roclip.data.shards import Manifest
from roclip.errors import RunLockedError
from roclip.storage import place

pytestmark = [pytest.mark.slow, pytest.mark.ray]
PER_SHARD = 6
BEHAVIOURS = (["ok"] * 4 + ["missing", "redirect"]) * 12
_LOOKS = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
_forks = multiprocessing.get_context("forkserver")
"""Each driver starts from a process that has imported everything."""


@pytest.fixture(scope="module")
def cluster():
    """A head that fetches nothing, and a node that does."""
    _forks.set_forkserver_preload(["ray", "cluster.ingest.job"])
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": _LOOKS}
    )
    add_node(cluster)
    yield cluster
    cluster.shutdown()


def add_node(cluster):
    """Room for two drivers: what one that is stopped was lent stays with it."""
    return cluster.add_node(num_cpus=2, resources={"ingest": 4}, object_store_memory=80 * 2**20)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An origin's URL list."""
    folder = tmp_path_factory.mktemp("served")
    with Origin(write_corpus(folder / "corpus.parquet", BEHAVIOURS)) as origin:
        origin.url_list(folder / "urls.parquet")
        yield folder / "urls.parquet"


@contextlib.contextmanager
def driver(cluster, urls, root, stores=None, expiry_s=30.0, **ingest):
    """An ingest in a process of its own, and what it says in the end."""
    said = _forks.Queue()
    settings = config(PER_SHARD, resource="ingest", shard_retries=100, **ingest)
    arguments = (cluster.address, settings, urls, root, stores, expiry_s, said)
    process = _forks.Process(target=drive, args=arguments)
    process.start()
    try:
        yield process, said
    finally:
        process.kill()
        process.join()


def workers():
    """The processes that fetch: of this file, as another may fetch beside it."""
    names = ("ray::ingest ", "ray::seal_part")
    return [p for p in psutil.Process().children(recursive=True) if _name(p).startswith(names)]


def _name(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def until(condition, process):
    ends.until(condition, lambda: "" if process.is_alive() else f"exit code {process.exitcode}")


def test_each_good_url_is_there_once_after_kills_at_random_moments(cluster, served, tmp_path):
    moments, kills = random.Random(5), {"worker": 0, "driver": 0}
    summary = None
    while summary is None:
        with driver(cluster, served, tmp_path) as (process, said):
            while process.is_alive() and said.empty():
                time.sleep(moments.uniform(0, 1.0))
                if kills["worker"] + kills["driver"] >= 20:
                    process.join()
                elif moments.random() < 0.15 and kills["driver"] < 4 and Manifest(tmp_path).records():
                    process.kill()
                    process.join()
                    kills["driver"] += 1
                elif (found := workers()) and moments.random() < 0.6:
                    with contextlib.suppress(psutil.Error):
                        moments.choice(found).kill()
                        kills["worker"] += 1
            if process.exitcode == 0 or not said.empty():
                summary = said.get()
            else:
                assert process.exitcode == -signal.SIGKILL
    assert sum(kills.values()) > 5, kills
    assert sealed_captions(tmp_path) == good_captions(BEHAVIOURS)
    assert (summary["urls"], summary["failed"]) == (len(BEHAVIOURS), {"http_404": 12})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["lease", "manifest"]


def test_driver_that_was_stopped_and_taken_over_publishes_nothing(cluster, served, tmp_path):
    with driver(cluster, served, tmp_path, expiry_s=2) as (stopped, late):
        until(lambda: Manifest(tmp_path).records(), stopped)
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(3)
        with driver(cluster, served, tmp_path) as (process, said):
            process.join()
            summary = said.get()
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
        os.kill(stopped.pid, signal.SIGCONT)
        assert isinstance(late.get(), RunLockedError)
    assert summary["urls"] == len(BEHAVIOURS)
    assert sealed_captions(tmp_path) == good_captions(BEHAVIOURS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == files


def test_store_that_goes_away_in_mid_write_loses_and_doubles_nothing(cluster, served, monkeypatch):
    moments = random.Random(7)
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        s3fs.S3FileSystem.clear_instance_cache()
        broken, hits = threading.Event(), []

        def fault(method, path, number):
            if method != "PUT" or "/shards/" not in path:
                return None
            if moments.random() < 0.25:
                hits.append(path)
                return moments.choice(["error", "lost"])
            return "error" if broken.is_set() else None

        server.fault = fault
        root = place("s3://bucket/shards")
        with driver(cluster, served, "s3://bucket/shards", stores=server.options) as (process, said):
            until(lambda: Manifest(root).records(), process)
            broken.set()
            time.sleep(1)
            broken.clear()
            process.join()
            summary = said.get()
        assert hits
        objects = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
        captions = []
        for record in Manifest(root).records():
            tar = objects.cat(f"bucket/shards/{record.name}")
            assert hashlib.sha256(tar).hexdigest() == record.sha256
            index = pq.read_table(io.BytesIO(objects.cat(f"bucket/shards/{record.name[:5]}.index.parquet")))
            for offset, size in zip(
                index["caption_offset"].to_pylist(), index["caption_size"].to_pylist(), strict=True
            ):
                captions.append(tar[offset : offset + size].decode())
    s3fs.S3FileSystem.clear_instance_cache()
    assert captions == good_captions(BEHAVIOURS)
    assert summary["urls"] == len(BEHAVIOURS)


def test_tasks_of_a_lost_node_are_done_by_another_and_count_as_no_failure(cluster, served, tmp_path):
    second = add_node(cluster)
    with driver(cluster, served, tmp_path, max_in_flight=8) as (process, said):
        until(lambda: Manifest(tmp_path).records(), process)
        cluster.remove_node(second, allow_graceful=False)
        process.join()
        summary = said.get()
    assert summary["urls"] == len(BEHAVIOURS)
    assert sealed_captions(tmp_path) == good_captions(BEHAVIOURS)
