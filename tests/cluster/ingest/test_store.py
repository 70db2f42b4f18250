"""Shards that go to an object store: the command itself, on a real Ray, from the embedded origin to S3 over loopback."""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time

import fsspec
import psutil
import pyarrow.parquet as pq
import pytest
import s3fs
from kit import environment, preset
from s3 import s3_server

from cluster.ingest.task import work_folder
from roclip.data.shards import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.ray]
PRESET = """
name: tiny
run_dir: {folder}/run
data: {{scenes: 100, shards: "s3://bucket/shards"}}
ingest: {{samples_per_shard: 20, image_size: 64,
  retry_passes: 0, policy: {{allow_networks: [127.0.0.0/8], robots: false, host_connections: 256, host_requests_per_s: 1.0e6}}}}
model: {{name: tiny}}
evaluate: {{size: 20}}
oracle: {{trusted: 20}}
"""


@pytest.fixture
def server(monkeypatch):
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_killed_ingest_to_a_store_does_only_the_rest_when_it_is_called_again(server, tmp_path):
    path = preset(tmp_path, PRESET.format(folder=tmp_path))
    options = environment(FSSPEC_S3=json.dumps(server.options))
    faults = {("PUT", "0.tar", 0): "hang", ("PUT", ".parquet", 0): "error", ("PUT", ".json", 0): "error"}
    server.fault = lambda method, path, number: next(
        (
            fault
            for (verb, end, first), fault in faults.items()
            if (verb, first) == (method, number) and path.endswith(end)
        ),
        None,
    )

    def ingest():
        command = [sys.executable, "-m", "cluster.cli", "ingest", str(path), "ingest.max_in_flight=1"]
        return subprocess.Popen(command, env=options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed, manifest = ingest(), Manifest("s3://bucket/shards")
    while len(manifest.records()) < 2:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    left = psutil.Process(killed.pid).children(recursive=True)
    for process in (psutil.Process(killed.pid), *left):  # the node is gone
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed.communicate()
    psutil.wait_procs(left, timeout=60)
    before, seen = manifest.records(), dict(server.seen)
    assert len(before) < 5
    assert manifest.summary is None

    again = ingest()
    said, errors = again.communicate(timeout=300)
    assert again.returncode == 0, said + errors
    records = manifest.records()
    assert [record.name for record in records] == [f"{number:05d}.tar" for number in range(5)]
    assert records[: len(before)] == before
    for record in before:
        put = "PUT", f"/bucket/shards/{record.name}"
        assert server.seen[put] == seen[put]
    objects = s3fs.S3FileSystem(**server.options, skip_instance_cache=True)
    for record in records:
        stem = f"bucket/shards/{record.name[:5]}"
        assert hashlib.sha256(objects.cat(f"{stem}.tar")).hexdigest() == record.sha256
        index = objects.cat(f"{stem}.index.parquet")
        assert hashlib.sha256(index).hexdigest() == record.index_sha256
        assert len(pq.read_table(io.BytesIO(index))) == record.samples
        assert objects.exists(f"{stem}.parquet")
    corpus = pq.read_table(tmp_path / "run" / "origin" / "corpus.parquet")["behaviour"].to_pylist()
    summary = manifest.summary
    assert summary["urls"] == sum(record.urls for record in records) == len(corpus)
    assert summary["succeeded"] == sum(behaviour in ("ok", "redirect", "slow") for behaviour in corpus)
    assert not (tmp_path / "run" / "shards").exists()
    assert not work_folder(manifest.root).exists()
