"""Tars that somebody else made: found by pattern, indexed once, and read as shards."""

import contextlib
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from hostile import SETTINGS, packed, tars
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import scene_samples, write_shard
from s3 import s3_server

from roclip.data import tar_sources
from roclip.data.cache import ShardCache
from roclip.data.reader import BadSampleError, ShardReader, decode
from roclip.data.shards import Manifest, read_index
from roclip.data.stream import Stream, StreamSettings, take_snapshot
from roclip.data.tar_sources import expand, index_tars, is_pattern
from roclip.defence.sample_filter import write_suspects
from roclip.errors import DataError
from roclip.report.gallery import sample_images


def members(first: int, count: int) -> list[tuple[str, bytes]]:
    """Of scenes with their captions, as img2dataset would pack them."""
    found = []
    for number, (image, caption) in enumerate(scene_samples(first, count, size_px=32), first):
        note = json.dumps({"captions": [f"{caption} {letter}" for letter in "abcd"]})
        key = f"{number:09d}"
        found += [(f"{key}.png", image), (f"{key}.txt", caption.encode()), (f"{key}.json", note.encode())]
    return found


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else packed(content))


@pytest.fixture
def laion(tmp_path):
    """Two downloads whose tars have the same names and keys."""
    for folder in ("one", "two"):
        for number in range(3):
            write(tmp_path / folder / f"{number:05d}.tar", members(4 * number, 4))
    return tmp_path


def stream(folder, cache=None, **changes):
    values = {"image_size": 32, "global_batch_size": 6, "seed": 0, "streams": 2, "shuffle_buffer": 4} | changes
    said = []

    def tokenize(captions):
        said.append(list(captions))
        return torch.tensor([[len(caption)] for caption in captions])

    return Stream(folder, StreamSettings(**values), tokenize=tokenize, cache=cache), said


def batches(folder, epoch=1, **changes):
    """Batches of an epoch, and each sample's caption by its id."""
    source, said = stream(folder, **changes)
    found = list(source.epoch(take_snapshot(Manifest(folder)), epoch))
    ids = [int(sample) for batch in found for sample in batch.ids]
    return found, dict(zip(ids, [caption for captions in said for caption in captions], strict=True))


@pytest.mark.parametrize(
    "where", ["a::b", "x/{0..3}.tar", "x/*.tar", "x/0000?.tar", "00000.tar", "s3://b/0.tar", "pipe:cat x"]
)
def test_what_looks_like_tars_is_a_pattern(where):
    assert is_pattern(where)


def test_a_folder_is_a_pattern_when_it_has_tars_and_no_manifest(laion, shards):
    assert is_pattern(str(laion / "one"))
    assert not is_pattern(str(shards))
    assert not is_pattern(str(laion))
    assert not is_pattern(str(laion / "nothing"))
    assert not is_pattern("")


def test_patterns_name_tars_in_order(laion, monkeypatch):
    monkeypatch.setenv("HOME", str(laion))
    one, two = ([str(laion / folder / f"{number:05d}.tar") for number in range(3)] for folder in ("one", "two"))
    braces, glob, folder = f"{laion}/one/{{00001..00000}}.tar", f"{laion}/one/0000[01]*.tar", f"{laion}/two"
    assert expand(f"{braces}::{folder}") == [(braces, one[0]), (braces, one[1]), *((folder, tar) for tar in two)]
    assert expand(glob) == [(glob, one[0]), (glob, one[1])]
    assert [tar for _, tar in expand("~/{two,one}/00002.tar")] == [one[2], two[2]]
    assert [tar for _, tar in expand(f"{laion}/{{one,two}}")] == one + two
    monkeypatch.chdir(laion)
    assert expand("one/00001.tar") == [("one/00001.tar", one[1])]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("{}/one/{{00000..00003}}.tar", r"one/00003.tar to be a tar, got no file"),
        ("{}/one/9*.tar", "at least one tar, got none"),
        ("{}/nothing", "cannot be listed"),
        ("{}/one/00000.tar::{}/one", "each tar once, got .*one/00000.tar 2 times"),
        ("{}/one::", "a source on each side"),
        ("{}/{{a", "balanced braces"),
        ("{}/{{0..99999999}}.tar", "at most 10,000,000 tars"),
        ("{}/" + 30 * "{{a,b}}" + ".tar", "at most 10,000,000 tars"),
        ("{}/{{" + 30 * "{{a,b}}" + ",c}}.tar", "at most 10,000,000 tars"),
        ("pipe:curl http://host/{{0..3}}.tar", "got a shell command"),
        ("nowhere://bucket/0.tar", "a URL that fsspec can read"),
    ],
)
def test_a_pattern_that_names_no_tars_is_told(laion, patterns, message):
    with pytest.raises(DataError, match=message):
        expand(patterns.format(laion, laion))


def test_a_folder_that_was_ingested_is_no_source(laion, shards):
    with pytest.raises(DataError, match="got one that was ingested"):
        expand(f"{laion}/one::{shards}")


def test_tars_become_shards_and_samples_of_equal_names_stay_apart(laion):
    said = []
    patterns = f"{laion}/one::{laion}/two/*.tar"
    manifest = index_tars(patterns, laion / "shards", on_progress=lambda *now: said.append(now))
    records = manifest.records()
    assert sorted(record.tar for record in records) == [tar for _, tar in expand(patterns)]
    assert [record.name[:5] for record in records] == ["00000", "00000", "00001", "00001", "00002", "00002"]
    assert {record.source for record in records} == set(patterns.split("::"))
    assert manifest.summary == {
        "urls": 24,
        "succeeded": 24,
        "failed": {},
        "shards": 6,
        "sources": dict.fromkeys(patterns.split("::"), 12),
    }
    assert said[-1][:2] == (6, 6)
    assert said[-1][2].startswith("6/6 tars  24 samples  ")
    assert " s left" in said[0][2]
    found, captions = batches(manifest.root)
    assert len(captions) == 24
    assert all(bool(batch.valid.all()) for batch in found)
    assert min(captions) >= 0
    assert sorted(captions.values()) == sorted(2 * [caption for _, caption in scene_samples(0, 12, size_px=32)])
    (picture,) = sample_images(manifest.root, 1)
    assert picture.caption == scene_samples(0, 1, size_px=32)[0][1]


def test_nothing_but_index_and_manifest_is_written(laion):
    before = {path: path.read_bytes() for path in laion.rglob("*.tar")}
    manifest = index_tars(f"{laion}/one", laion / "shards")
    names = [record.name.removesuffix(".tar") for record in manifest.records()]
    assert {path.name for path in manifest.root.iterdir()} == {"manifest", *(f"{name}.index.parquet" for name in names)}
    assert {path: path.read_bytes() for path in laion.rglob("*.tar")} == before


def test_a_second_call_reads_no_tar_and_a_stopped_one_goes_on(laion, monkeypatch):
    patterns, read, reading = f"{laion}/one::{laion}/two", [], tar_sources._reading

    def stops_after_two(tar):
        read.append(tar)
        if len(read) == 3:
            raise KeyboardInterrupt
        return reading(tar)

    with monkeypatch.context() as patched:
        patched.setattr(tar_sources, "_reading", stops_after_two)
        with pytest.raises(KeyboardInterrupt):
            index_tars(patterns, laion / "shards", workers=1)
    manifest = Manifest(laion / "shards")
    assert 2 <= len(manifest.records()) < 6
    assert manifest.summary is None
    index_tars(patterns, laion / "shards")
    assert len(manifest.records()) == 6
    write_alone = index_tars(patterns, laion / "alone").records()
    assert manifest.records() == write_alone
    monkeypatch.setattr(tar_sources, "_reading", lambda tar: pytest.fail("read"))
    summary = manifest.summary
    assert index_tars(patterns, laion / "shards").records() == write_alone
    assert manifest.summary == summary
    assert manifest.summary is not None


def test_tars_that_came_later_are_added(laion):
    index_tars(f"{laion}/one", laion / "shards")
    write(laion / "one" / "00003.tar", members(50, 2))
    manifest = index_tars(f"{laion}/one", laion / "shards")
    assert (len(manifest.records()), manifest.summary["succeeded"]) == (4, 14)


def test_a_folder_of_other_shards_is_refused(laion, shards):
    index_tars(f"{laion}/one", laion / "index")
    for patterns in (f"{laion}/two", f"{laion}/one/*.tar", f"{laion}/one/{{00000..00001}}.tar"):
        with pytest.raises(DataError, match="Use another folder"):
            index_tars(patterns, laion / "index")
    with pytest.raises(DataError, match=r"got 0000.\.tar of an ingest"):
        index_tars(f"{laion}/one", shards)


def test_what_cannot_be_used_is_counted_by_reason(tmp_path):
    good = members(0, 3)
    image = good[0][1]
    write(
        tmp_path / "in/bad.tar",
        [*good, *good[:3], ("a.gif", image), ("a.txt", b"a"), ("b.png", image), ("c.cls", b"1")],
    )
    write(tmp_path / "in/cut.tar", packed(good)[: -1024 - 512])
    write(tmp_path / "in/none.tar", b"\x1f\x8b" + bytes(600))
    write(tmp_path / "in/wrong.tar", packed(good)[:-1024] + b"x" * 512)
    records = {
        record.tar.rsplit("/", 1)[1]: record for record in index_tars(f"{tmp_path}/in", tmp_path / "out").records()
    }
    assert {name: (record.samples, record.failed) for name, record in records.items()} == {
        "bad.tar": (3, {"duplicate_key": 1, "no_caption": 1, "no_image": 2}),
        "cut.tar": (3, {"truncated_tar": 1}),  # only the last json is cut
        "none.tar": (0, {"broken_tar": 1}),
        "wrong.tar": (3, {"broken_tar": 1}),
    }
    assert all(record.urls == record.samples + sum(record.failed.values()) for record in records.values())
    content = (tmp_path / "in/cut.tar").read_bytes()
    (index,) = [read_index(tmp_path / "out", records["cut.tar"].name).to_pylist()[-1:]]
    assert (index[0]["json_offset"], index[0]["json_size"]) == (0, 0)
    assert content[index[0]["image_offset"] :][: index[0]["image_size"]] == good[6][1]


def test_a_sample_that_is_cut_counts_once(tmp_path):
    first, content = (packed(members(0, count))[:-1024] for count in (1, 2))
    for cut in range(len(first) + 512, len(content), 512):
        write(tmp_path / f"{cut}.tar", content[:cut])
        (record,) = index_tars(f"{tmp_path}/{cut}.tar", tmp_path / str(cut)).records()
        assert record.failed == {"truncated_tar": 1}


def test_tars_without_samples_are_an_error_that_says_why(tmp_path):
    write(tmp_path / "0.tar", [("0.tiff", b""), ("0.txt", b"a cat")])
    for _ in range(2):
        with pytest.raises(DataError, match=r"got none in 1 tars \(no_image 1\). Check the suffixes"):
            index_tars(f"{tmp_path}/0.tar", tmp_path / "out")


def test_a_tar_that_cannot_be_opened_is_named(laion, monkeypatch):
    listed = expand(f"{laion}/one")
    (laion / "one" / "00001.tar").unlink()
    monkeypatch.setattr(tar_sources, "expand", lambda patterns: listed)
    with pytest.raises(DataError, match=r"one/00001\.tar: expected a tar that can be read"):
        index_tars(f"{laion}/one", laion / "shards")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"memory:///nothing\.tar: expected a tar that can be read"):
        index_tars("memory:///nothing.tar", laion / "shards2")


def test_columns_of_img2dataset_are_carried(laion):
    rows = {
        "key": ["000000002", "000000000", "000000002", "000000007"],
        "url": ["two", "zero", "again", "elsewhere"],
        "similarity": [0.25, 0.5, 0.0, 0.0],
        "image_size": [1, 1, 1, 1],
        "exif": pa.array([None, [{"a": 1}], None, None]),
    }
    pq.write_table(pa.table(rows), laion / "one" / "00000.parquet")
    (laion / "one" / "00001.parquet").write_bytes(b"PAR1 nothing PAR1")
    pq.write_table(pa.table({"url": ["no key"]}), laion / "one" / "00002.parquet")
    manifest = index_tars(f"{laion}/one", laion / "shards")
    first, *others = [read_index(manifest.root, record.name) for record in manifest.records()]
    assert first["url"].to_pylist() == ["zero", None, "two", None]
    assert first["similarity"].to_pylist() == [0.5, None, 0.25, None]
    assert first["exif"].to_pylist() == [[{"a": 1}], None, None, None]
    assert min(first["image_size"].to_pylist()) > 1
    own = {"key", "id", "image_offset", "image_size", "caption_offset", "caption_size", "json_offset", "json_size"}
    assert all(set(other.column_names) == own for other in others)
    reader = ShardReader(manifest.root, manifest.records()[0])
    assert set(reader.index) == own
    assert reader.id(1) == first["id"][1].as_py()


def test_one_of_several_captions_is_chosen_by_seed_epoch_and_sample(laion):
    folder = index_tars(f"{laion}/one::{laion}/two", laion / "shards").root
    epochs = [batches(folder, epoch, caption_key="captions")[1] for epoch in (1, 2)]
    assert epochs[0] == batches(folder, 1, caption_key="captions", streams=4)[1]
    chosen = [[caption[-1] for _, caption in sorted(epoch.items())] for epoch in epochs]
    assert set(chosen[0]) == set(chosen[1]) == set("abcd")
    assert 6 < sum(a != b for a, b in zip(*chosen, strict=True)) < 24
    assert batches(folder, 1, caption_key="captions", seed=1)[1] != epochs[0]


def test_a_sample_without_the_caption_that_was_asked_for_is_counted(tmp_path):
    image = scene_samples(0, 1, size_px=32)[0][0]
    notes = {
        "json": b'{"c": ["", " one ", 7]}',
        "one": b'{"c": "two"}',
        "list": b'["c"]',
        "key": b'{"d": "x"}',
        "empty": b'{"c": " "}',
        "cut": b'{"c": "x',
        "deep": b"[" * 100_000,
        "bytes": b'{"c": "\xff"}',
        "half": b'{"c": "\\ud800"}',
        "long": json.dumps({"c": "x" * 100_000}).encode(),
    }
    contents = [(f"{key}.png", image) for key in notes] + [("txt.png", image)]
    texts = {f"{key}.png": (f"{key}.json", note) for key, note in notes.items()} | {"txt.png": ("txt.txt", b"text")}
    write(tmp_path / "0.tar", [each for member in contents for each in (member, texts[member[0]])])
    (record,) = index_tars(f"{tmp_path}/0.tar", tmp_path / "out").records()

    def captions(key):
        reader = ShardReader(tmp_path / "out", record, caption_key=key)
        found = {}
        for sample in range(record.samples):
            try:
                found[reader.key(sample)] = reader.captions(sample)
            except BadSampleError as error:
                found[reader.key(sample)] = str(error)
        return found

    asked = captions("c")
    assert asked.pop("long") == ["x" * 2048]
    assert asked == {
        "json": ["one"],
        "one": ["two"],
        **dict.fromkeys(("list", "key", "empty"), "no_caption"),
        **dict.fromkeys(("cut", "deep", "bytes"), "broken_json"),
        "half": "caption_not_utf8",
        "txt": "no_json",
    }
    assert captions("") == {**dict.fromkeys(notes, "no_caption"), "txt": ["text"]}
    write_shard(tmp_path / "ingested", 0, scene_samples(0, 1))
    with pytest.raises(BadSampleError, match="no_json"):
        ShardReader(tmp_path / "ingested", Manifest(tmp_path / "ingested").records()[0], caption_key="c").captions(0)


def test_suspects_are_named_by_key_and_shard(laion):
    manifest = index_tars(f"{laion}/one::{laion}/two", laion / "shards")
    record = manifest.records()[3]
    sample = ShardReader(manifest.root, record).id(2)
    write_suspects(laion / "suspects.parquet", {sample: 0.5}, manifest)
    (row,) = pq.read_table(laion / "suspects.parquet").to_pylist()
    assert (row["id"], row["key"], row["shard"]) == (sample, "000000006", record.name)


@pytest.fixture
def server(laion, monkeypatch):
    monkeypatch.setattr("roclip.storage.FIRST_WAIT_S", 0.01)
    with s3_server("bucket") as server:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options)
        s3fs.S3FileSystem(**server.options).put(str(laion / "one"), "bucket/one", recursive=True)
        server.seen.clear()
        yield server
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("patterns", ["s3://bucket/one/{00000..00002}.tar", "s3://bucket/one/*.tar", "s3://bucket/one"])
def test_tars_of_a_store_that_fails_now_and_then_are_those_of_the_disk(laion, server, patterns):
    faults = ["error", "short", "hang"]
    server.fault = lambda method, path, number: (
        faults[int(path[-5])] if method == "GET" and path.endswith(".tar") and number == 0 else None
    )
    here, there = index_tars(f"{laion}/one", laion / "here"), index_tars(patterns, laion / "there")
    assert is_pattern(patterns)
    assert [record.tar for record in there.records()] == [f"s3://bucket/one/{number:05d}.tar" for number in range(3)]
    assert {record.sha256 for record in there.records()} == {record.sha256 for record in here.records()}
    _, expected = batches(here.root)
    for cache in (None, ShardCache(laion / "cache", 10**9)):
        found, captions = batches(there.root, cache=cache)
        assert all(bool(batch.valid.all()) for batch in found)
        assert sorted(captions.values()) == sorted(expected.values())
    assert len(list((laion / "cache").iterdir())) == 3


def test_indexes_may_lie_on_a_store_and_tars_here(laion, server):
    manifest = index_tars(f"{laion}/two", "s3://bucket/index")
    server.seen.clear()
    found, captions = batches(manifest.root, cache=ShardCache(laion / "cache", 10**9))
    assert all(bool(batch.valid.all()) for batch in found)
    assert len(captions) == 12
    assert not (laion / "cache").exists()


def test_a_tar_that_is_not_on_the_store_is_named(laion, server):
    with pytest.raises(DataError, match=r"s3://bucket/one/00003\.tar: expected a tar that can be read"):
        index_tars("s3://bucket/one/{00000..00003}.tar", laion / "out")


@settings(max_examples=150, **SETTINGS)
@given(st.lists(tars(), min_size=1, max_size=3), st.booleans())
def test_any_damaged_tars_are_indexed_and_each_sample_reads_or_says_why_not(tmp_path, contents, noted):
    shutil.rmtree(tmp_path)
    for number, content in enumerate(contents):
        write(tmp_path / "in" / f"{number}.tar", content)
        if noted:
            (tmp_path / "in" / f"{number}.parquet").write_bytes(content)
    with contextlib.suppress(DataError):  # not one sample
        index_tars(f"{tmp_path}/in", tmp_path / "out", workers=1)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert len(list((tmp_path / "in").iterdir())) == len(contents) * (1 + noted)
    records = Manifest(tmp_path / "out").records()
    assert len(records) == len(contents)
    ids = []
    for record in records:
        assert record.urls == record.samples + sum(record.failed.values())
        for key in ("", "c"):
            reader = ShardReader(tmp_path / "out", record, caption_key=key)
            for sample in range(record.samples):
                ids.append(reader.id(sample))
                try:
                    assert decode(reader.image(sample), 16).shape == (16, 16, 3)
                    assert all(reader.captions(sample))
                except BadSampleError:
                    pass
            reader.close()
    assert len(set(ids)) == len(ids) / 2


@pytest.mark.parametrize("cached", [True, False])
def test_tars_of_a_web_server_that_knows_no_ranges(laion, cached):
    """`http.server` lists no folder for fsspec and answers a range with the whole file."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(laion / "one"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            urls = f"http://127.0.0.1:{server.server_port}/{{00000..00002}}.tar"
            remote = index_tars(urls, laion / "remote")
            cache = ShardCache(laion / "cache", 10**9) if cached else None
            batches = list(stream(remote.root, cache=cache)[0].epoch(take_snapshot(remote), 1))
        finally:
            server.shutdown()
            serving.join()
    assert [int(batch.valid.sum()) for batch in batches] == [6, 6]
    assert all(batch.bad == () for batch in batches)
