"""The sink, called as img2dataset's downloader calls it: resize an answer, then write its row."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import REPOSITORY
from PIL import Image

from ingest.lists.sources import Part, open_list
from ingest.shard.rows import CUT_CAPTION_CHARS, MAX_CAPTION_BYTES, Rows
from ingest.shard.sample_sink import SampleSink
from ingest.shard.verify import verify
from roclip.config import IngestConfig
from roclip.data.shards import sample_key

PER_SHARD = 100
NUMBER = 3  # of the shard
IMG2DATASET = [
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "exif",
    "sha256",
]


class _Shard:
    """What the sink has written."""

    def __init__(self, tar: Path, parquet: Path):
        self.tar, self.parquet = tar, parquet
        self.rows = pq.read_table(parquet).to_pylist()
        with tarfile.open(tar) as archive:
            self.members = {member.name: archive.extractfile(member).read() for member in archive}

    def metadata_json(self, row: int) -> dict:
        return json.loads(self.members[f"{_key(row)}.json"])


def _key(row):
    return sample_key(NUMBER * PER_SHARD + row, PER_SHARD)


def _table(count, captions=None, **columns):
    captions = captions or [f"caption of {row}" for row in range(count)]
    return pa.table({"url": [f"http://a.example/{row}" for row in range(count)], "caption": captions, **columns})


def _pass(folder, table, answers, *, order=None, excluded=None, **options):
    """Bring answers (bytes, or the text of an error) through a sink, one for each row that is to be fetched."""
    folder.mkdir(exist_ok=True)
    config = IngestConfig(**{"image_size": 32, "samples_per_shard": PER_SHARD, **options})
    rows = Rows(Part(NUMBER, table), PER_SHARD, excluded)
    release_body = []
    sink = SampleSink(rows, folder, config, release_body.append)
    urls = rows.urls()["url"].to_pylist()
    for row in range(len(rows)) if order is None else order:
        answer = answers[row] if urls[row] else "unknown url type: ''"
        meta = {"status": "failed_to_download", "error_message": answer}
        image = None
        if isinstance(answer, bytes):
            image, *_, error = sink(io.BytesIO(answer), None)
            meta = {"status": "success" if error is None else "failed_to_resize", "error_message": error}
        sink.write(image, _key(row), None, meta)
    sink.close()
    assert release_body == [
        len(answers[row]) for row in (order or range(len(rows))) if urls[row] and isinstance(answers[row], bytes)
    ]
    return _Shard(sink.tar, sink.parquet)


def test_sample_is_named_and_noted_as_img2dataset_does(tmp_path):
    content = pictures.jpeg(96, 64)
    table = _table(1, similarity=pa.array([0.25]), LANGUAGE=pa.array(["en"]))
    shard = _pass(tmp_path, table, [content])
    assert list(shard.members) == [f"{_key(0)}.{suffix}" for suffix in ("jpg", "txt", "json")]
    assert shard.members[f"{_key(0)}.txt"] == b"caption of 0"
    with Image.open(io.BytesIO(shard.members[f"{_key(0)}.jpg"])) as stored:
        assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (32, 32))
    assert pq.read_schema(shard.parquet).names == [
        "url",
        "caption",
        "similarity",
        "LANGUAGE",
        *IMG2DATASET,
        "phash",
        "flags",
    ]
    (row,) = shard.rows
    expected = {
        "url": "http://a.example/0",
        "caption": "caption of 0",
        "similarity": 0.25,
        "LANGUAGE": "en",
        "key": _key(0),
        "status": "success",
        "error_message": None,
        "width": 32,
        "height": 32,
        "original_width": 96,
        "original_height": 64,
        "exif": "{}",
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert row == {**expected, "phash": row["phash"], "flags": []}
    assert shard.metadata_json(0) == {**expected, "phash": f"{row['phash']:016x}", "flags": []}
    assert list(shard.metadata_json(0)) == pq.read_schema(shard.parquet).names


def test_types_of_the_parquet_do_not_depend_on_what_came(tmp_path):
    good = _pass(tmp_path / "good", _table(2), [pictures.jpeg(), pictures.jpeg(seed=1)])
    bad = _pass(tmp_path / "bad", _table(2), ["HTTP Error 404: Not Found"] * 2)
    assert pq.read_schema(good.parquet).equals(pq.read_schema(bad.parquet))
    assert str(pq.read_schema(good.parquet).field("phash").type) == "uint64"
    assert str(pq.read_schema(good.parquet).field("width").type) == "int32"


def test_exif_is_left_out_when_it_is_not_wanted(tmp_path):
    shard = _pass(tmp_path, _table(1), [pictures.turned(6)], extract_exif=False)
    assert "exif" not in shard.rows[0]
    assert "exif" not in shard.metadata_json(0)


ANSWERS = [
    pictures.jpeg(),
    "HTTP Error 404: Not Found",
    pictures.jpeg(seed=2),
    pictures.HTML,
    pictures.jpeg(seed=4),
    pictures.encode(pictures.image(seed=5), "PNG"),
]


def test_bytes_are_the_same_in_whichever_order_answers_come(tmp_path):
    bytes_of = set()
    for number, order in enumerate(itertools.islice(itertools.permutations(range(6)), 0, None, 37)):
        shard = _pass(tmp_path / str(number), _table(6), ANSWERS, order=order)
        bytes_of.add((shard.tar.read_bytes(), shard.parquet.read_bytes()))
    assert number > 15
    assert len(bytes_of) == 1


def test_every_row_has_a_fate(tmp_path):
    captions = ["a", "b", "c", "d", "", "f"]
    shard = _pass(tmp_path, _table(6, captions), ANSWERS, order=[5, 3, 1, 4])
    assert [row["key"] for row in shard.rows] == [_key(row) for row in range(6)]
    assert [row["status"] for row in shard.rows] == ["failed_to_download"] * 2 + ["failed_to_download"] + [
        "failed_to_resize",
        "failed_to_download",
        "success",
    ]
    report = verify(shard.tar, shard.parquet)
    assert report.failed == {"empty_caption": 1, "http_404": 1, "no_record": 2, "not_an_image": 1}
    assert report.samples == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (pictures.SVG, "not_an_image"),
        (pictures.png_bomb(), "too_many_pixels"),
        (pictures.jpeg()[:600], "undecodable"),
        (pictures.jpeg(20, 20), "too_small"),
        (pictures.jpeg(400, 40), "aspect_ratio"),
    ],
)
def test_refused_image_ends_as_a_reason_and_leaves_its_hash(tmp_path, content, reason):
    shard = _pass(tmp_path, _table(1), [content], min_image_size=32, max_aspect_ratio=4.0)
    (row,) = shard.rows
    assert (row["status"], row["error_message"].partition(":")[0]) == ("failed_to_resize", reason)
    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["width"] is row["phash"] is None
    assert shard.members == {}
    assert verify(shard.tar, shard.parquet).failed == {reason: 1}


def test_payload_behind_an_image_is_not_stored(tmp_path):
    for skip in (False, True):
        hidden = pictures.with_zip_behind(pictures.jpeg(32, 32))
        shard = _pass(tmp_path / str(skip), _table(1), [hidden], skip_reencode=skip)
        assert b"payload" not in shard.tar.read_bytes()
        assert verify(shard.tar, shard.parquet).samples == 1


def test_fetched_bytes_are_stored_when_nothing_is_to_be_done(tmp_path):
    content = pictures.jpeg(32, 32)
    shard = _pass(tmp_path, _table(1), [content], skip_reencode=True, resize_mode="no")
    assert shard.members[f"{_key(0)}.jpg"] == content


def test_flags_say_what_was_put_right(tmp_path):
    answers = [pictures.turned(6), pictures.sixteen_bits(3), pictures.animated("GIF"), pictures.jpeg()]
    shard = _pass(tmp_path, _table(4, ["a", "b", "c", "d\0"]), answers)
    assert [row["flags"] for row in shard.rows] == [["turned"], ["sixteen_bit"], ["first_frame"], ["caption_cleaned"]]
    report = verify(shard.tar, shard.parquet)
    assert report.flags == {"caption_cleaned": 1, "first_frame": 1, "sixteen_bit": 1, "turned": 1}
    assert (shard.rows[0]["original_width"], shard.rows[0]["original_height"]) == (96, 64)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("a\0b\x1b[31mc\x7f\x85d", "a b [31mc  d"),
        ("a caf\ufffd", "a caf\ufffd"),  # as a list reads bytes that are not UTF-8
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("café \U0001f600", "café \U0001f600"),
    ],
)
def test_caption_is_stored_as_clean_text(tmp_path, given, stored):
    shard = _pass(tmp_path, _table(1, [given]), [pictures.jpeg()])
    assert (
        shard.members[f"{_key(0)}.txt"].decode()
        == stored
        == shard.rows[0]["caption"]
        == shard.metadata_json(0)["caption"]
    )
    cleaned = given != stored or "\ufffd" in given
    assert shard.rows[0]["flags"] == (["caption_cleaned"] if cleaned else [])


def test_caption_that_is_not_utf8_comes_from_a_parquet_as_text(tmp_path):
    raw = b"caf\xe9 \xed\xa0\x80."  # Latin-1, and half a surrogate pair
    offsets = pa.array([0, len(raw)], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(raw)])
    pq.write_table(pa.table({"url": ["http://a.example/0"], "caption": broken}), tmp_path / "list.parquet")
    (part,) = open_list(str(tmp_path / "list.parquet")).parts(PER_SHARD)
    shard = _pass(tmp_path / "shard", part.table, [pictures.jpeg()])
    assert shard.members[f"{_key(0)}.txt"].decode() == raw.decode(errors="replace")
    assert shard.rows[0]["flags"] == ["caption_cleaned"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty_caption"),
        (None, "empty_caption"),
        (" \0\n", "empty_caption"),
        ("a" * 10_000_000, "caption_too_long"),
        ("é" * (MAX_CAPTION_BYTES // 2 + 1), "caption_too_long"),
    ],
)
def test_hopeless_caption_is_not_fetched(tmp_path, caption, reason):
    table = _table(2, pa.array([caption, "a cat"]))
    assert Rows(Part(0, table), PER_SHARD).urls()["url"].to_pylist() == ["", "http://a.example/1"]
    shard = _pass(tmp_path, table, ["never asked for", pictures.jpeg()])
    assert shard.rows[0]["url"] == "http://a.example/0"
    assert len(shard.rows[0]["caption"]) <= CUT_CAPTION_CHARS
    report = verify(shard.tar, shard.parquet)
    assert report.failed == {reason: 1}
    assert report.samples == 1


def test_longest_caption_is_stored(tmp_path):
    shard = _pass(tmp_path, _table(1, ["a" * MAX_CAPTION_BYTES]), [pictures.jpeg()])
    assert len(shard.members[f"{_key(0)}.txt"]) == MAX_CAPTION_BYTES


def test_row_that_is_left_out_says_why(tmp_path):
    shard = _pass(tmp_path, _table(2), ["never", pictures.jpeg()], excluded={0: "kills_worker: five times"})
    assert verify(shard.tar, shard.parquet).failed == {"kills_worker": 1}
    assert shard.rows[0]["url"] == "http://a.example/0"


def test_carried_values_enter_parquet_and_json(tmp_path):
    columns = {
        "path": pa.array(["../../etc/passwd"]),
        "not_a_number": pa.array([float("nan")]),
        "tags": pa.array([["a", None]]),
        "place": pa.array([{"lat": float("inf"), "name": "x"}]),
        "nothing": pa.array([None], pa.int64()),
    }
    shard = _pass(tmp_path, _table(1, **columns), [pictures.jpeg()])
    metadata_json = shard.metadata_json(0)
    assert {name: metadata_json[name] for name in columns} == {
        "path": "../../etc/passwd",
        "not_a_number": None,
        "tags": ["a", None],
        "place": {"lat": None, "name": "x"},
        "nothing": None,
    }
    assert {name.partition(".")[0] for name in shard.members} == {_key(0)}
    stored = pq.read_table(shard.parquet)
    for name, column in columns.items():
        assert stored.schema.field(name).type == column.type


def test_list_of_texts_that_are_not_utf8_is_left_out(tmp_path):
    offsets = pa.array([0, 4], pa.int32()).buffers()[1]
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"caf\xe9")])
    tags = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), broken)
    shard = _pass(tmp_path, _table(1, tags=tags), [pictures.jpeg()])
    assert shard.rows[0]["tags"] is None
    assert shard.metadata_json(0)["tags"] is None


CONTENT = pictures.jpeg(200, 120)
AGAIN = pictures.jpeg(200, 120, quality=60)  # the same image, other bytes
OTHER = pictures.jpeg(200, 120, seed=9)


def _expecting(content, tmp_path):
    """What a list holds that has seen these bytes."""
    seen = _pass(tmp_path / "seen", _table(1), [content]).rows[0]
    return {
        "expected_md5": [hashlib.md5(content).hexdigest()],
        "expected_sha256": [seen["sha256"]],
        "expected_phash": pa.array([seen["phash"]], pa.uint64()),
    }


@pytest.mark.parametrize(
    ("check", "outcomes"),  # of the same bytes, of the same image, of another one
    [
        ("off", ["kept", "kept", "kept"]),
        ("warn", ["kept", "flagged", "flagged"]),
        ("strict", ["kept", "dropped", "dropped"]),
        ("perceptual", ["kept", "flagged", "dropped"]),
    ],
)
@pytest.mark.parametrize("known", ["expected_md5", "expected_sha256"])
def test_bytes_that_the_list_does_not_expect(tmp_path, check, outcomes, known):
    expected = _expecting(CONTENT, tmp_path)
    columns = {known: expected[known], "expected_phash": expected["expected_phash"]}
    for answer, outcome in zip((CONTENT, AGAIN, OTHER), outcomes, strict=True):
        folder = tmp_path / hashlib.md5(answer).hexdigest()
        shard = _pass(folder, _table(1, **columns), [answer], hash_check=check)
        (row,) = shard.rows
        assert row["sha256"] == hashlib.sha256(answer).hexdigest()
        assert set(columns) <= set(row)
        if outcome == "dropped":
            assert (row["status"], row["error_message"].partition(":")[0]) == ("failed_to_download", "hash_mismatch")
            assert shard.members == {}
        else:
            assert row["status"] == "success"
            assert row["flags"] == (["hash_mismatch"] if outcome == "flagged" else [])


@pytest.mark.parametrize(("check", "kept"), [("strict", False), ("perceptual", False), ("warn", True)])
def test_picture_alone_is_judged_when_the_list_knows_no_other_hash(tmp_path, check, kept):
    columns = {"expected_phash": _expecting(CONTENT, tmp_path)["expected_phash"]}
    for answer, fits in ((AGAIN, True), (OTHER, False)):
        shard = _pass(tmp_path / str(fits), _table(1, **columns), [answer], hash_check=check)
        assert (shard.rows[0]["status"] == "success") is (fits or kept)
        assert shard.rows[0]["flags"] == ([] if fits or not kept else ["hash_mismatch"])


def test_row_without_expected_hash_is_not_judged(tmp_path):
    columns = {"expected_md5": pa.array([None], pa.string()), "expected_phash": pa.array([None], pa.uint64())}
    shard = _pass(tmp_path, _table(1, **columns), [CONTENT], hash_check="strict")
    assert shard.rows[0]["status"] == "success"


def test_mismatch_without_a_known_picture_is_dropped_in_perceptual_mode(tmp_path):
    columns = {"expected_md5": ["0" * 32]}
    shard = _pass(tmp_path, _table(1, **columns), [CONTENT], hash_check="perceptual")
    assert shard.rows[0]["error_message"].startswith("hash_mismatch: other md5 ")


FULL_DISK = """
import io, resource, signal, sys
from pathlib import Path
import pyarrow as pa
from ingest.shard.sample_sink import SampleSink
from ingest.shard.rows import Rows
from ingest.lists.sources import Part
from roclip.config import IngestConfig
from roclip.errors import ShardError

image = Path(sys.argv[1]).read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
rows = Rows(Part(0, pa.table({"url": ["x"] * 50, "caption": ["a cat"] * 50})), 100)
sink = SampleSink(rows, Path(sys.argv[2]), IngestConfig(image_size=128), lambda size: None)
for row in range(50):
    stored, *_ = sink(io.BytesIO(image))
    sink.write(stored, rows.key(row), None, {"status": "success", "error_message": None})
try:
    sink.close()
except ShardError as error:
    print(error)
"""


def test_full_disk_fails_the_shard(tmp_path):
    (tmp_path / "image").write_bytes(pictures.jpeg(128, 128))
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "image"), str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert "00000.tar: a sample could not be written" in done.stdout
    assert not (tmp_path / "work" / "00000.tar").exists()
    assert not (tmp_path / "work" / "00000.parquet").exists()
