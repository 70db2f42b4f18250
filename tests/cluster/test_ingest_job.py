"""Ingest on a real local Ray, from a real origin, with workers that are killed."""

import io
import os
import signal
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from cluster.ingest_job import ingest
from cluster.ingest_progress import IngestProgress
from cluster.ingest_task import OUTAGE_URLS, WORK
from ingest.origin import Origin
from roclip.config import ClusterConfig, Config, DataConfig, FetchPolicy, IngestConfig
from roclip.errors import DataError, StageError
from roclip.shards import Manifest, index_path, sample_key, sha256_file

pytestmark = pytest.mark.ray
PER_SHARD = 20
FATES = {
    "missing": "http_404",
    "broken": "not_an_image",
    "truncated": "truncated_image",
    "refused": "connection_refused",
    "hang": "timeout",
}


@pytest.fixture(scope="module")
def local_ray():
    """A Ray with room for four tasks, so that only `max_in_flight` holds them back."""
    home = str(Path(__file__).parents[2])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        logging_level="error",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": home}},
    )
    yield
    ray.shutdown()


def _config(shard_retries=2, max_bad_frac=0.3, samples_per_shard=PER_SHARD):
    return Config(
        data=DataConfig(images="embedded", max_bad_frac=max_bad_frac),
        ingest=IngestConfig(
            samples_per_shard=samples_per_shard,
            image_size=32,
            threads=8,
            timeout_s=2.5,
            retries=0,
            max_in_flight=2,
            shard_retries=shard_retries,
            retry_passes=0,
            policy=FetchPolicy(
                allow_networks=("127.0.0.0/8",), robots=False, host_requests_per_s=1e6, host_connections=256
            ),
        ),
        cluster=ClusterConfig(cpus_per_ingest_task=0.5),
    )


def _write_corpus(path, behaviours):
    images = []
    for row in range(len(behaviours)):
        pixels = np.random.default_rng(row).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    columns = {
        "path": [f"/{row}.jpg" for row in range(len(behaviours))],
        "image": images,
        "caption": [f"caption {row}" for row in range(len(behaviours))],
        "behaviour": behaviours,
    }
    pq.write_table(pa.table(columns), path)
    return path


def _serve(tmp_path, behaviours):
    return Origin(_write_corpus(tmp_path / "corpus.parquet", behaviours))


def _keys(root):
    """All keys of the sealed shards, whose files must be what the manifest says they are."""
    keys = []
    for record in Manifest(root).records():
        assert sha256_file(root / record.name) == record.sha256
        assert sha256_file(index_path(root, record.name)) == record.index_sha256
        index = pq.read_table(index_path(root, record.name)).column("key").to_pylist()
        assert record.samples == len(index)
        assert record.urls == record.samples + sum(record.failed.values())
        keys += index
    return keys


def _good_keys(behaviours):
    good = ("ok", "redirect", "slow")
    return [sample_key(row, PER_SHARD) for row, behaviour in enumerate(behaviours) if behaviour in good]


class _Watch(threading.Thread):
    """Counts the shards in flight in the folder of unfinished work; kills the first worker that it finds."""

    def __init__(self, root, kill=False):
        super().__init__()
        self.root, self.kill = root, kill
        self.most, self.killed = 0, ""
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.005):
            folders = sorted(path.name for path in (self.root / WORK).glob("*"))
            self.most = max(self.most, len(folders))
            if self.kill and folders and (self.root / WORK / folders[0] / f"{folders[0][:5]}.tar").exists():
                self.kill, self.killed = False, folders[0]
                os.kill(int(folders[0].split("-pid")[1].split("-")[0]), signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()


@pytest.mark.slow
def test_every_good_url_is_in_one_shard_when_a_worker_is_killed(local_ray, tmp_path):
    behaviours = (["ok"] * 7 + ["slow", "missing", "redirect"]) * 10 + ["ok"] * 7
    for row, fault in zip(range(3, 100, 9), list(FATES) * 3, strict=False):
        behaviours[row] = fault
    root = tmp_path / "shards"
    (root / WORK / "00009-pid1-left").mkdir(parents=True)
    seen = []
    with _serve(tmp_path, behaviours) as origin, _Watch(root, kill=True) as watch:
        origin.url_list(tmp_path / "urls.parquet")
        summary = ingest(_config(), tmp_path / "urls.parquet", root, on_progress=seen.append)
    assert watch.killed
    assert watch.most == 2
    assert _keys(root) == _good_keys(behaviours)
    fates = Counter(FATES[behaviour] for behaviour in behaviours if behaviour in FATES)
    assert summary["failed"] == dict(fates)
    assert (summary["urls"], summary["shards"]) == (len(behaviours), 6)
    assert summary["succeeded"] == len(_good_keys(behaviours))
    assert summary["images_per_s"] > 0
    assert Manifest(root).summary == summary
    assert not (root / WORK).exists()
    last = seen[-1]
    assert (last.done_urls, last.shards, last.succeeded) == (len(behaviours), 6, summary["succeeded"])
    assert [now.shards for now in seen] == sorted(now.shards for now in seen)


def test_resume_keeps_what_is_sealed_and_does_the_rest(local_ray, tmp_path):
    behaviours = ["ok", "ok", "ok", "missing", "slow"] * 24
    root, urls, stop = tmp_path / "shards", tmp_path / "urls.parquet", threading.Event()

    def stop_after_two(now: IngestProgress):
        if now.shards >= 2:
            stop.set()

    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(urls)
        first = ingest(_config(), urls, root, on_progress=stop_after_two, stop=stop)
        sealed = {record.name: record for record in Manifest(root).records()}
        assert 2 <= first["shards"] <= len(sealed) < 6
        assert Manifest(root).summary is None
        assert not (root / WORK).exists()
    with _serve(tmp_path, behaviours) as origin:  # on another port: the list's URLs are others, its rows the same
        origin.url_list(urls)
        second = ingest(_config(), urls, root)
        assert {name: record for record in Manifest(root).records() if (name := record.name) in sealed} == sealed
        assert _keys(root) == _good_keys(behaviours)
        assert (second["urls"], second["succeeded"], second["failed"]) == (120, 96, {"http_404": 24})
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert ingest(_config(), urls, root) == second  # the origin is gone: nothing is fetched
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == files


def test_shard_of_bad_images_ends_the_ingest_and_names_itself(local_ray, tmp_path):
    behaviours = ["ok"] * PER_SHARD + ["ok", "missing", "broken", "broken"] * (PER_SHARD // 4)
    root = tmp_path / "shards"
    config = _config(max_bad_frac=0.1)
    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        with pytest.raises(
            DataError, match=r"shard 00001\.tar: .*at most 10\.0%.* got 66\.7%.*not_an_image 10"
        ) as error:
            ingest(config, tmp_path / "urls.parquet", root)
        assert "http_404 5" in str(error.value)
        assert all(record.name == "00000.tar" for record in Manifest(root).records())
        assert Manifest(root).summary is None
        ingest(_config(max_bad_frac=0.7), tmp_path / "urls.parquet", root)
    assert _keys(root) == _good_keys(behaviours)


def test_shard_that_always_fails_is_tried_as_often_as_configured(local_ray, tmp_path):
    behaviours = ["refused"] * OUTAGE_URLS
    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        config = _config(shard_retries=1, samples_per_shard=OUTAGE_URLS)
        with pytest.raises(StageError, match=r"00000\.tar failed 2 times, last: none of 100.*connection_refused 100"):
            ingest(config, tmp_path / "urls.parquet", tmp_path / "shards")
    assert Manifest(tmp_path / "shards").records() == ()


def test_shards_of_another_list_are_refused(local_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from where the workers stand
    with _serve(tmp_path, ["ok"] * 5) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        ingest(_config(), tmp_path / "urls.parquet", Path("shards"))
    assert len(_keys(tmp_path / "shards")) == 5
    pq.write_table(pa.table({"url": ["http://a.example/"] * 9, "caption": ["x"] * 9}), tmp_path / "more.parquet")
    with pytest.raises(DataError, match=r"00000\.tar was sealed for 5 URLs and the list has 9"):
        ingest(_config(), tmp_path / "more.parquet", tmp_path / "shards")
