"""img2dataset against a real origin, in a process of its own as under Ray: fetching changes its process."""

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ingest.fetch import Fetched
from ingest.origin import Origin
from ingest.verify import verify
from roclip.config import FetchPolicy, IngestConfig
from roclip.shards import sample_key

SCRIPT = """
import json, sys
from pathlib import Path
from ingest.fetch import fetch
from ingest.sources import read_url_list, split
from roclip.config import FetchPolicy, IngestConfig

urls, work, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
config = IngestConfig(**{**options, 'policy': FetchPolicy(**options['policy'])})
part = split(read_url_list(urls), config.samples_per_shard)[-1]
work.mkdir()
fetched = fetch(part, work, config)
heavy = [name for name in ("torch", "ray", "faiss", "deepspeed", "open_clip") if name in sys.modules]
print(json.dumps([str(fetched.tar), str(fetched.parquet), fetched.urls, heavy]))
"""
BEHAVIOURS = [
    "ok",
    "missing",
    "redirect",
    "broken",
    "truncated",
    "slow",
    "hang",
    "refused",
    "dead_host",
    "ok",
    "ok",
    "ok",
]
CAPTIONS = [*(f"caption of {row}" for row in range(9)), "", " \n", "a bomb"]
FIRST = 100  # rows of the list before the shard: the key must count them


def _fetch(urls, work, policy=None):
    policy = FetchPolicy(**(policy or {}))
    config = IngestConfig(samples_per_shard=FIRST, image_size=48, timeout_s=3.0, retries=0, policy=policy)
    home = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(urls), str(work), json.dumps(asdict(config))],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": home},
    )
    assert done.returncode == 0, done.stderr
    tar, parquet, rows, heavy = json.loads(done.stdout.splitlines()[-1])
    return Fetched(Path(tar), Path(parquet), rows), heavy, done


def _bomb():
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def crawl(tmp_path_factory, jpeg):
    """One shard of everything that can happen to a URL."""
    folder = tmp_path_factory.mktemp("crawl")
    rows = range(len(BEHAVIOURS))
    corpus = {
        "path": [f"/{row}.jpg" for row in rows],
        "image": [*(jpeg(row) for row in rows[:-1]), _bomb()],
        "caption": CAPTIONS,
        "behaviour": BEHAVIOURS,
    }
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    with Origin(folder / "corpus.parquet") as origin:
        origin.url_list(folder / "urls.parquet")
        served = pq.read_table(folder / "urls.parquet")
        more = {"url": ["file:///etc/hostname", "", "no url"], "caption": ["a file", "no url", "no url"]}
        before = {"url": ["http://127.0.0.1:1/"] * FIRST, "caption": ["of an earlier shard"] * FIRST}
        pq.write_table(pa.concat_tables([pa.table(before), served, pa.table(more)]), folder / "urls.parquet")
        return _fetch(folder / "urls.parquet", folder / "work", policy={"allow_networks": ["127.0.0.0/8"]})


def test_fetch_gives_every_row_its_fate(crawl):
    fetched, _, _ = crawl
    report = verify(fetched.tar, fetched.parquet, urls=fetched.urls)
    assert report.index.column("key").to_pylist() == [sample_key(FIRST + row, FIRST) for row in (0, 2, 5)]
    assert report.failed == {
        "bad_url": 2,
        "connection_refused": 1,
        "empty_caption": 2,
        "http_404": 1,
        "no_host": 1,
        "not_an_image": 1,
        "refused_scheme": 1,
        "timeout": 1,
        "too_many_pixels": 1,
        "truncated_image": 1,
    }
    assert report.urls == fetched.urls == 15


def test_fetched_sample_lies_where_the_index_says(crawl, jpeg, tmp_path):
    fetched, _, _ = crawl
    index = verify(fetched.tar, fetched.parquet).index.to_pylist()
    tar = fetched.tar.read_bytes()
    for row, sample in zip((0, 2, 5), index, strict=True):
        caption = tar[sample["caption_offset"] :][: sample["caption_size"]]
        assert caption.decode() == CAPTIONS[row]
        (tmp_path / "stored.jpg").write_bytes(tar[sample["image_offset"] :][: sample["image_size"]])
        (tmp_path / "served.jpg").write_bytes(jpeg(row))
        with Image.open(tmp_path / "stored.jpg") as stored, Image.open(tmp_path / "served.jpg") as served:
            assert stored.size == (48, 48)
            near = [
                abs(a - b)
                for a, b in zip(stored.resize((4, 4)).tobytes(), served.resize((4, 4)).tobytes(), strict=True)
            ]
            assert max(near) < 60  # the same picture, but for two rounds of JPEG


def test_fetch_keeps_the_training_stack_out_of_its_process(crawl):
    _, heavy, _ = crawl
    assert heavy == []


def test_fetch_says_nothing(crawl):
    _, _, done = crawl
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_fetch_refuses_loopback_when_private_addresses_are_not_allowed(write_corpus, tmp_path):
    with Origin(write_corpus(["ok", "redirect"])) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        fetched, _, _ = _fetch(tmp_path / "urls.parquet", tmp_path / "work")
    report = verify(fetched.tar, fetched.parquet)
    assert report.failed == {"refused_address": 2}
    assert report.samples == 0
