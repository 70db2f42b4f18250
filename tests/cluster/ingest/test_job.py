"""Ingest on a real local Ray, from a real origin, with workers that are killed."""

import contextlib
import os
import signal
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ingesting import (
    PER_SHARD,
    WORKERS,
    config,
    good_captions,
    good_keys,
    sealed_captions,
    sealed_keys,
    write_corpus,
)

from cluster.ingest.job import ingest
from cluster.ingest.task import OUTAGE_URLS, WORK
from cluster.ray.connect import start_local_ray
from ingest.origin import Origin
from roclip.data.shards import HELD, Manifest, index_path, sample_key
from roclip.errors import ConfigError, DataError, RunLockedError, StageError
from roclip.metrics.series import SERIES
from roclip.report.ingest_progress import IngestProgress, describe

pytestmark = pytest.mark.ray
OUTCOMES = {
    "missing": "http_404",
    "broken": "not_an_image",
    "truncated": "truncated_image",
    "refused": "connection_refused",
    "hang": "timeout",
}


@pytest.fixture(scope="module")
def local_ray():
    """A Ray with room for four tasks, so that only `max_in_flight` holds them back."""
    start_local_ray(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        runtime_env=WORKERS,
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield
    ray.shutdown()


def _serve(tmp_path, behaviours, deadly=()):
    return Origin(write_corpus(tmp_path / "corpus.parquet", behaviours, deadly))


class _Watch(threading.Thread):
    """Counts the shards in flight in the folder of unfinished work; kills the first worker that it finds."""

    def __init__(self, root, kill=False):
        super().__init__()
        self.root, self.kill = root, kill
        self.most, self.killed = 0, ""
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.005):
            with contextlib.suppress(FileNotFoundError):  # a folder that goes while it is looked at
                self._look()

    def _look(self):
        folders = sorted(os.listdir(self.root / WORK))
        self.most = max(self.most, len(folders))
        if self.kill and folders and (self.root / WORK / folders[0] / "urls.feather").exists():
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
    for row, fault in zip(range(3, 100, 9), list(OUTCOMES) * 3, strict=False):
        behaviours[row] = fault
    root = tmp_path / "shards"
    (root / WORK / "00009-pid1-left").mkdir(parents=True)
    seen = []
    with _serve(tmp_path, behaviours) as origin, _Watch(root, kill=True) as watch:
        origin.url_list(tmp_path / "urls.parquet")
        summary = ingest(config(), tmp_path / "urls.parquet", root, on_progress=seen.append)
    assert watch.killed
    assert watch.most == 2
    assert sealed_keys(root) == good_keys(behaviours)
    assert sealed_captions(root) == good_captions(behaviours)
    outcomes = Counter(OUTCOMES[behaviour] for behaviour in behaviours if behaviour in OUTCOMES)
    assert summary["failed"] == dict(outcomes)
    assert (summary["urls"], summary["shards"]) == (len(behaviours), 6)
    assert summary["succeeded"] == len(good_keys(behaviours))
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
        first = ingest(config(), urls, root, on_progress=stop_after_two, stop=stop)
        sealed = {record.name: record for record in Manifest(root).records()}
        assert 2 <= first["shards"] <= len(sealed) < 6
        assert Manifest(root).summary is None
        assert not (root / WORK).exists()
    with _serve(tmp_path, behaviours) as origin:  # on another port: the list's URLs are others, its rows the same
        origin.url_list(urls)
        second = ingest(config(), urls, root)
        assert {name: record for record in Manifest(root).records() if (name := record.name) in sealed} == sealed
        assert sealed_keys(root) == good_keys(behaviours)
        assert (second["urls"], second["succeeded"], second["failed"]) == (120, 96, {"http_404": 24})
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert ingest(config(), urls, root) == second  # the origin is gone: nothing is fetched
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()} == files


def test_shard_of_bad_images_ends_the_ingest_and_names_itself(local_ray, tmp_path):
    behaviours = ["ok"] * PER_SHARD + ["ok", "missing", "broken", "broken"] * (PER_SHARD // 4)
    root = tmp_path / "shards"
    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        with pytest.raises(
            DataError, match=r"shard 00001\.tar: .*at most 10\.0%.* got 66\.7%.*not_an_image 10"
        ) as error:
            ingest(config(max_bad_frac=0.1), tmp_path / "urls.parquet", root)
        assert "http_404 5" in str(error.value)
        assert all(record.name == "00000.tar" for record in Manifest(root).records())
        assert Manifest(root).summary is None
        ingest(config(max_bad_frac=0.7), tmp_path / "urls.parquet", root)
    assert sealed_keys(root) == good_keys(behaviours)


def test_shard_that_always_fails_is_tried_as_often_as_configured(local_ray, tmp_path):
    behaviours = ["refused"] * OUTAGE_URLS
    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        settings = config(OUTAGE_URLS, shard_retries=1)
        with pytest.raises(StageError, match=r"00000\.tar failed 2 times, last: none of 100 URLs arrived: .*host_down"):
            ingest(settings, tmp_path / "urls.parquet", tmp_path / "shards")
    assert Manifest(tmp_path / "shards").records() == ()


def test_shards_of_another_list_are_refused(local_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from where the workers stand
    with _serve(tmp_path, ["ok"] * 5) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        ingest(config(), tmp_path / "urls.parquet", Path("shards"))
    assert len(sealed_captions(tmp_path / "shards")) == 5
    pq.write_table(pa.table({"url": ["http://a.example/"] * 9, "caption": ["x"] * 9}), tmp_path / "more.parquet")
    with pytest.raises(DataError, match=r"00000\.tar was sealed for 5 URLs and the list has 5 other rows"):
        ingest(config(), tmp_path / "more.parquet", tmp_path / "shards")


def _list_of(path, urls, first=0):
    rows = range(first, first + len(urls))
    pq.write_table(pa.table({"url": urls, "caption": [f"caption {row}" for row in rows]}), path)
    return path


def test_rows_that_a_list_has_got_since_become_new_shards(local_ray, tmp_path):
    behaviours = ["ok"] * 23 + ["missing"] * 2 + ["ok"] * 20
    root, urls = tmp_path / "shards", tmp_path / "urls.parquet"
    with _serve(tmp_path, behaviours) as origin:
        every = [origin.url(f"/{row}.jpg") for row in range(len(behaviours))]
        first = ingest(config(), _list_of(urls, every[:25]), root)
        assert (first["urls"], first["shards"]) == (25, 2)
        before = Manifest(root).records()
        second = ingest(config(), _list_of(urls, every), root)
        assert (second["urls"], second["shards"], second["failed"]) == (45, 3, {"http_404": 2})
        assert Manifest(root).records()[:2] == before  # the short one stays as it is
        assert sealed_captions(root) == good_captions(behaviours)
        assert sealed_keys(root)[-20:] == [sample_key(2 * PER_SHARD + row, PER_SHARD) for row in range(20)]
        assert ingest(config(), urls, root) == second
        with pytest.raises(DataError, match=r"00001\.tar was sealed for 5 URLs and the list has 3 rows there"):
            ingest(config(), _list_of(urls, every[:23]), root)
        with pytest.raises(DataError, match=r"expected ingest\.samples_per_shard=20"):
            ingest(config(10), _list_of(urls, every[:44]), root)


def test_what_failed_in_passing_is_fetched_again_into_new_shards(local_ray, tmp_path):
    behaviours = (["ok"] * 5 + ["missing"]) * 8
    later = set(range(0, 48, 6)) | {1, 2, 3}  # their server is down while the list is read
    never = {4, 5 + 5}
    root, urls, stop, seen, up = tmp_path / "shards", tmp_path / "urls.parquet", threading.Event(), [], []
    with _serve(tmp_path, behaviours) as origin, Origin(origin.corpus) as other:
        places = [other if row in later else origin for row in range(48)]
        names = [place.url(f"/{row}.jpg") for row, place in enumerate(places)]
        names[4] = names[10] = origin.url("/4.jpg").replace(str(origin.port), str(origin._closed.getsockname()[1]))
        _list_of(urls, names)
        port = other.port
        other._end()

        def look(now: IngestProgress):
            seen.append(now)
            if now.done_urls == 48 and not up:
                up.append(Origin(origin.corpus, port).__enter__())
                assert up[0].port == port
            if now.again_done:
                stop.set()

        settings = config(6, retry_passes=2)
        try:
            ingest(settings, urls, root, on_progress=look, stop=stop)
            assert stop.is_set()
            assert Manifest(root).summary is None
            summary = ingest(settings, urls, root, on_progress=seen.append)
        finally:
            for one in up:
                one.__exit__()
        again = ingest(settings, urls, root)
    assert again == summary
    good = [f"caption {row}" for row in range(48) if behaviours[row] == "ok" and row not in never]
    assert sorted(sealed_captions(root)) == sorted(good)
    keys = sealed_keys(root)
    assert len(set(map(int, keys))) == len(keys) == summary["succeeded"] == len(good)
    assert summary["urls"] == 48
    assert summary["failed"] == {"http_404": 8 - len(never & {5, 11}), "connection_refused": 2}
    records = Manifest(root).records()
    assert [sum(record.retried.values()) for record in records] == [0] * 8 + [6, 6, 1, 2]
    assert records[8].retried.keys() <= {"connection_refused", "host_down"}  # after three it is left alone for a while
    assert records[11].failed == {"connection_refused": 2}
    rows = pq.read_table(root / "00011.parquet").to_pylist()
    assert sorted(row["retry_of"] for row in rows) == [sample_key(row, 6) for row in sorted(never)]
    assert seen[-1].done_urls == seen[-1].total_urls == 48
    assert {now.pass_number for now in seen} == {0, 1, 2}
    assert "pass 1: 6/13 again" in {describe(now).split("  ")[2] for now in seen if now.pass_number}


def test_rows_that_kill_their_worker_are_found_and_left_out(local_ray, tmp_path, caplog):
    behaviours = ["ok"] * 12
    root = tmp_path / "shards"
    with _serve(tmp_path, behaviours, deadly=(1, 4)) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        summary = ingest(config(6, shard_retries=0, max_bad_frac=0.5), tmp_path / "urls.parquet", root)
    assert summary["failed"] == {"kills_worker": 2}
    assert sealed_captions(root) == [f"caption {row}" for row in range(12) if row not in (1, 4)]
    rows = pq.read_table(root / "00000.parquet").sort_by("key").to_pylist()
    assert [row["url"] for row in rows] == [origin.url(f"/{row}.jpg") for row in range(6)]
    assert [row["error_message"] for row in rows if row["status"] != "success"] == [
        "kills_worker: the process that handled this row died each time"
    ] * 2
    assert "shard 00000.tar: rows 1, 4 kill the worker and are excluded" in caplog.text


def test_second_ingest_of_the_same_folder_is_refused_and_stop_ends_the_first_in_seconds(local_ray, tmp_path):
    root, stop, ended = tmp_path / "shards", threading.Event(), []
    with _serve(tmp_path, ["hang"] * 400) as origin:
        origin.url_list(tmp_path / "urls.parquet")

        def run():
            ended.append(ingest(config(200), tmp_path / "urls.parquet", root, stop=stop))

        first = threading.Thread(target=run)
        first.start()
        while not list((root / WORK).glob("*/*")):
            time.sleep(0.05)
        with pytest.raises(RunLockedError, match=rf"process {os.getpid()} on .* has been filling these shards since"):
            ingest(config(200), tmp_path / "urls.parquet", root)
        stop.set()
        first.join(timeout=20)  # 400 timeouts of 2.5 s in 16 threads would take a minute
        assert not first.is_alive()
    assert ended[0]["shards"] == 0
    assert not (root / WORK).exists()


def test_quarantine_holds_shards_until_the_end_and_releases_less(local_ray, tmp_path):
    root, seen, stop = tmp_path / "shards", [], threading.Event()
    settings = config(6, quarantine=("caption_burst",))

    def first_only(root, held):
        for record in held:
            index = pq.read_table(index_path(root, record.name)).slice(0, 1)
            yield _with_index(root, record, index)

    def look(now):
        seen.append(now)
        if now.shards >= 2:
            stop.set()

    with _serve(tmp_path, ["ok"] * 20) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        with pytest.raises(ConfigError, match=r"ingest\.quarantine"):
            ingest(settings, tmp_path / "urls.parquet", root)
        ingest(settings, tmp_path / "urls.parquet", root, on_progress=look, stop=stop, release=first_only)
        held = Manifest(root, HELD).records()
        assert len(held) >= 2
        assert Manifest(root).records() == ()
        assert max(now.published for now in seen) == 0
        summary = ingest(settings, tmp_path / "urls.parquet", root, release=first_only)
    assert [record.samples for record in Manifest(root).records()] == [1, 1, 1, 1]
    assert Manifest(root, HELD).records() == ()
    assert sealed_keys(root) == [sample_key(row, 6) for row in (0, 6, 12, 18)]
    assert summary["urls"] == 20


def _with_index(root, record, index):
    import dataclasses

    from roclip.storage import sha256_file

    path = index_path(root, record.name)
    pq.write_table(index, path)
    left = {"caption_burst": record.samples - 1} if record.samples > 1 else {}
    return dataclasses.replace(record, samples=1, index_sha256=sha256_file(path), failed={**record.failed, **left})


def test_metrics_come_out_of_rays_prometheus_endpoint(local_ray, tmp_path):
    behaviours = ["ok"] * 15 + ["missing"] * 5
    with _serve(tmp_path, behaviours) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        ingest(config(), tmp_path / "urls.parquet", tmp_path / "shards")
    names = {series.exposed for series in SERIES.values() if series.name.startswith("roclip_ingest_")}
    names -= {f"ray_roclip_ingest_{name}_total" for name in ("refused", "task_failures")}  # none here
    deadline_s = time.monotonic() + 30
    while missing := {name for name in names if name not in (page := _metrics_page())}:
        assert time.monotonic() < deadline_s, missing
        time.sleep(0.5)
    lines = [line for line in page.splitlines() if line.startswith("ray_roclip_ingest_")]
    assert all('run="urls"' in line for line in lines)
    assert any("failed_total" in line and 'reason="http_404"' in line for line in lines)
    assert any("host_errors_total" in line and 'host="127.0.0.1"' in line for line in lines)
    assert any("phase_seconds_total" in line and 'phase="fetch"' in line for line in lines)


def _metrics_page():
    ports = [node["MetricsExportPort"] for node in ray.nodes()]
    pages = [urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) for port in ports]
    return "".join(page.read().decode() for page in pages)
