"""Fetching from a real origin, in a process of its own as under Ray: it changes its process."""

import gc
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import REPOSITORY
from PIL import Image

from ingest.origin import Origin
from ingest.shard.fetch import FetchedShard
from ingest.shard.verify import verify
from roclip.config import FetchPolicy, IngestConfig
from roclip.data.shards import sample_key

SCRIPT = """
import json, sys
from pathlib import Path
import pyarrow.parquet as pq
from ingest.shard.fetch import fetch
from ingest.shard.publish import publish
from ingest.lists.sources import Part
from ingest.shard.verify import verify
from roclip.config import FetchPolicy, IngestConfig

urls, work, number, options = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
config = IngestConfig(**{**options, 'policy': FetchPolicy(**options['policy'])})
table = pq.read_table(urls)
part = Part(number, table.slice(number * config.samples_per_shard, config.samples_per_shard))
work.mkdir()
heavy = ["cv2 too early"] if "cv2" in sys.modules else []
fetched = fetch(part, work, config)
heavy += [name for name in ("torch", "ray", "faiss", "deepspeed", "open_clip") if name in sys.modules]
print(json.dumps([str(fetched.tar), str(fetched.parquet), fetched.urls, heavy]))
"""
SHIM = """
import sys
from pathlib import Path
import pyarrow.feather, pyarrow.parquet as pq
from ingest.shard import img2dataset_shim

urls, work = sys.argv[1], Path(sys.argv[2])
work.mkdir()
img2dataset_shim.downloader()
from img2dataset.writer import WebDatasetSampleWriter

resizer = img2dataset_shim.resizer().Resizer(image_size=48, resize_mode="border", resize_only_if_bigger=False)
options = dict(verify_hash_type=None, oom_shard_count=5, number_sample_per_shard=100, thread_count=8, timeout=3, retries=0)
download = img2dataset_shim.downloader().Downloader(
    WebDatasetSampleWriter, resizer, save_caption=True, extract_exif=True, output_folder=str(work), encode_format="jpg",
    column_list=["url", "caption", "similarity"], compute_hash="sha256", user_agent_token=None,
    disallowed_header_directives=None, **options,
)
pyarrow.feather.write_feather(pq.read_table(urls), str(work / "urls.feather"), compression="uncompressed")
print(download((0, str(work / "urls.feather")))[0])
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


LOOPBACK = {"allow_networks": ["127.0.0.0/8"]}


def _run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    return done


def _fetch(urls, work, policy=None, number=1, **options):
    options = {"samples_per_shard": FIRST, "image_size": 48, "timeout_s": 3.0, "retries": 0, **options}
    config = IngestConfig(policy=FetchPolicy(**(policy or {})), **options)
    done = _run(SCRIPT, urls, work, number, json.dumps(asdict(config)))
    tar, parquet, rows, heavy = json.loads(done.stdout.splitlines()[-1])
    return FetchedShard(Path(tar), Path(parquet), rows), heavy, done


@pytest.fixture(scope="module")
def crawl(tmp_path_factory, jpeg):
    """One shard of everything that can happen to a URL."""
    folder = tmp_path_factory.mktemp("crawl")
    rows = range(len(BEHAVIOURS))
    corpus = {
        "path": [f"/{row}.jpg" for row in rows],
        "image": [*(jpeg(row) for row in rows[:-1]), pictures.png_bomb()],
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
        return _fetch(folder / "urls.parquet", folder / "work", policy=LOOPBACK)


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
        fetched, _, _ = _fetch(tmp_path / "urls.parquet", tmp_path / "work", number=0)
    report = verify(fetched.tar, fetched.parquet)
    assert report.failed == {"refused_address": 2}
    assert report.samples == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same ten answers, taken twice by us, with many threads and with one, and once by img2dataset alone."""
    folder = tmp_path_factory.mktemp("pair")
    exif = Image.Exif()
    exif[0x010F] = "Canon"
    images = [
        *(pictures.jpeg(100 + row, 60, seed=row) for row in range(5)),
        pictures.jpeg(exif=exif),
        pictures.encode(pictures.with_alpha(), "PNG"),
        pictures.encode(pictures.image().convert("L"), "PNG"),
        pictures.HTML,
        pictures.jpeg(seed=9),
    ]
    corpus = {
        "path": [f"/{row}.jpg" for row in range(10)],
        "image": images,
        "caption": [f"caption of {row}" for row in range(10)],
        "behaviour": ["slow", *["ok"] * 3, "slow", *["ok"] * 4, "missing"],
    }
    pq.write_table(pa.table(corpus), folder / "corpus.parquet")
    with Origin(folder / "corpus.parquet") as origin:
        origin.url_list(folder / "urls.parquet")
        listed = pq.read_table(folder / "urls.parquet")
        pq.write_table(listed.append_column("similarity", pa.array(range(10))), folder / "urls.parquet")
        many, one = (
            _fetch(folder / "urls.parquet", folder / f"threads-{threads}", LOOPBACK, 0, threads=threads)[0]
            for threads in (8, 1)
        )
        assert _run(SHIM, folder / "urls.parquet", folder / "peer").stdout.splitlines()[-1] == "True"
    return many, one, FetchedShard(folder / "peer" / "00000.tar", folder / "peer" / "00000.parquet", 10)


def test_same_answers_give_the_same_bytes_when_they_come_in_another_order(pair):
    many, one, peer = pair
    assert many.tar.read_bytes() == one.tar.read_bytes()
    assert many.parquet.read_bytes() == one.parquet.read_bytes()
    with tarfile.open(peer.tar) as theirs, tarfile.open(many.tar) as ours:
        assert theirs.getnames() != ours.getnames()  # the slow ones last
        assert ours.getnames() == [
            f"{sample_key(row, FIRST)}.{suffix}" for row in range(8) for suffix in ("jpg", "txt", "json")
        ]


def test_shard_is_what_img2dataset_makes(pair):
    ours, _, peer = pair
    names = pq.read_schema(peer.parquet).names
    assert pq.read_schema(ours.parquet).names == [*names, "phash", "flags"]
    for name in names:
        assert pq.read_schema(ours.parquet).field(name).type == pq.read_schema(peer.parquet).field(name).type, name
    theirs = {row["key"]: row for row in pq.read_table(peer.parquet).to_pylist()}
    for row in pq.read_table(ours.parquet, columns=names).to_pylist():
        wording = {"error_message": theirs[row["key"]]["error_message"]} if row["status"] != "success" else {}
        image = {"sha256": None} if row["status"] == "failed_to_resize" else {}  # img2dataset hashes what it keeps
        assert {**row, **wording, **image} == theirs[row["key"]]
    with tarfile.open(peer.tar) as left, tarfile.open(ours.tar) as right:
        assert sorted(left.getnames()) == sorted(right.getnames())
        for name in left.getnames():
            expected, stored = (archive.extractfile(name).read() for archive in (left, right))
            if name.endswith(".json"):
                expected, stored = json.loads(expected), json.loads(stored)
                assert {key: value for key, value in stored.items() if key not in ("phash", "flags")} == expected
            else:
                assert stored == expected, name


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves the tar open
def test_shard_is_read_by_webdataset(pair):
    import webdataset

    pipeline = webdataset.WebDataset(str(pair[0].tar), shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt", "json")
    samples = list(pipeline)
    del pipeline
    gc.collect()
    assert len(samples) == 8
    for row, (image, caption, metadata_json) in enumerate(samples):
        assert image.shape == (48, 48, 3)
        assert caption == f"caption of {row}" == metadata_json["caption"]


def test_caption_is_not_fetched_for_when_there_is_none(write_corpus, tmp_path):
    with Origin(write_corpus(["hang", "ok"], captions=["", "a cat"])) as origin:
        origin.url_list(tmp_path / "urls.parquet")
        fetched, _, _ = _fetch(tmp_path / "urls.parquet", tmp_path / "work", LOOPBACK, 0, timeout_s=100.0)
    assert verify(fetched.tar, fetched.parquet).failed == {"empty_caption": 1}
