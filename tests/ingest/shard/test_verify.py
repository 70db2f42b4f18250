import io
import random
import tarfile

import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import SETTINGS, tars
from hypothesis import given, settings

from ingest.shard.verify import FORMATS, MAX_PIXELS, verify
from roclip.data import reader
from roclip.data.outcomes import reason_of


def _shard(folder, members, rows):
    """Write a tar of (name, bytes) and a parquet of (key, caption, status, error_message)."""
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    names = ("key", "caption", "status", "error_message")
    columns = list(zip(*rows, strict=True)) or [[]] * 4
    table = pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})
    pq.write_table(table, folder / "00000.parquet")
    return folder / "00000.tar", folder / "00000.parquet"


def _sample(key, image, caption="a cat"):
    return [(f"{key}.jpg", image), (f"{key}.json", b"{}"), (f"{key}.txt", caption.encode())]


def _good(jpeg, count):
    members = [member for row in range(count) for member in _sample(f"{row:05d}", jpeg(row), f"caption {row}")]
    return members, [(f"{row:05d}", f"caption {row}", "success", None) for row in range(count)]


def test_whole_shard_is_indexed_by_key(tmp_path, jpeg):
    members, rows = _good(jpeg, 4)
    tar, parquet = _shard(tmp_path, members[::-1], rows)
    report = verify(tar, parquet)
    assert (report.samples, report.urls, report.failed, report.bad_frac) == (4, 4, {}, 0.0)
    content = tar.read_bytes()
    for row, sample in enumerate(report.index.to_pylist()):
        assert sample["key"] == f"{row:05d}"
        assert content[sample["image_offset"] :][: sample["image_size"]] == jpeg(row)
        assert content[sample["caption_offset"] :][: sample["caption_size"]] == f"caption {row}".encode()


def test_samples_before_the_cut_are_used_when_the_tar_is_cut_anywhere(tmp_path, jpeg):
    members, rows = _good(jpeg, 3)
    tar, parquet = _shard(tmp_path, members, rows)
    whole = tar.read_bytes()
    index = verify(tar, parquet).index.to_pylist()
    ends = [sample["caption_offset"] + sample["caption_size"] for sample in index]  # .txt is the last member
    cuts = sorted({0, 1, *range(0, ends[-1] + 600, 211), *ends, *(end - 1 for end in ends)})
    for cut in cuts:
        tar.write_bytes(whole[:cut])
        report = verify(tar, parquet)
        complete = sum(end <= cut for end in ends)
        assert report.index.to_pylist() == index[:complete], cut
        assert report.failed == ({"truncated_tar": 3 - complete} if complete < 3 else {}), cut


def test_rows_that_gave_no_sample_are_counted_by_reason(tmp_path, jpeg):
    members = [
        *_sample("00000", jpeg(0)),
        *_sample("00001", jpeg(1)[:300]),
        *_sample("00002", b""),
    ]
    members += [*_sample("00003", jpeg(3), " \n"), *_sample("00004", jpeg(4))[:2]]
    rows = [(f"{row:05d}", "a cat", "success", None) for row in range(5)]
    rows[3] = ("00003", None, "success", None)
    rows += [("00005", "a cat", "failed_to_download", "HTTP Error 404: Not Found")]
    rows += [("00006", "", "failed_to_download", "HTTP Error 404: Not Found")]
    rows += [("00007", "a cat", "failed_to_resize", "Image decoding error")]
    tar, parquet = _shard(tmp_path, members, rows)
    report = verify(tar, parquet, urls=10)
    assert report.index.column("key").to_pylist() == ["00000"]
    assert report.failed == {
        "empty_caption": 2,
        "http_404": 1,
        "no_record": 2,
        "not_an_image": 1,
        "truncated_tar": 1,
        "undecodable": 2,
    }
    assert report.urls == 10 == report.samples + sum(report.failed.values())
    assert report.bad_frac == pytest.approx(8 / 9)  # all but the 404: nothing arrived there


def test_caption_is_read_from_the_tar_when_the_parquet_claims_one(tmp_path, jpeg):
    tar, parquet = _shard(tmp_path, _sample("00000", jpeg(0), ""), [("00000", "a cat", "success", None)])
    assert verify(tar, parquet).failed == {"empty_caption": 1}


def test_image_of_too_many_pixels_is_not_decoded(tmp_path):
    members = [("00000.png", pictures.png_bomb()), ("00000.txt", b"a wall")]
    tar, parquet = _shard(tmp_path, members, [("00000", "a wall", "success", None)])
    assert verify(tar, parquet).failed == {"too_many_pixels": 1}


def test_unreadable_parquet_leaves_what_the_tar_shows(tmp_path, jpeg):
    tar, parquet = _shard(tmp_path, *_good(jpeg, 2))
    parquet.write_bytes(b"PAR1")
    report = verify(tar, parquet, urls=5)
    assert report.samples == 2
    assert report.failed == {"no_record": 3}


@settings(max_examples=150, **SETTINGS)
@given(tars())
def test_any_damaged_tar_is_verified(tmp_path, content):
    tar, parquet = _shard(tmp_path, [], [("0", "a cat", "success", None), ("1", "a cat", "success", None)])
    tar.write_bytes(content)
    report = verify(tar, parquet)
    assert report.samples + sum(report.failed.values()) >= report.urls == 2
    for sample in report.index.to_pylist():
        assert 0 < sample["image_offset"] <= len(content) - sample["image_size"]
        assert content[sample["caption_offset"] :][: sample["caption_size"]].strip()
    assert {path.name for path in tmp_path.iterdir()} == {"00000.tar", "00000.parquet"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 503: Service Unavailable", "http_503"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("<urlopen error [Errno 111] Connection refused>", "connection_refused"),
        ("[Errno 104] Connection reset by peer", "connection_reset"),
        ("Remote end closed connection without response", "connection_reset"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "no_host"),
        ("<urlopen error [Errno 101] Network is unreachable>", "unreachable"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "tls_error"),
        ("IncompleteRead(0 bytes read, 7 more expected)", "truncated_image"),
        ("HTTP Error 302: Found - Redirection to url 'file:///x' is not allowed", "refused_scheme"),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("unknown url type: 'x'", "bad_url"),
        ("the moon is full", "other"),
    ],
)
def test_message_is_counted_under_a_short_reason(message, reason):
    assert reason_of(message) == reason


def test_bounds_are_those_of_training():
    assert (MAX_PIXELS, FORMATS) == (reader.MAX_PIXELS, reader.FORMATS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_image_is_usable_exactly_when_training_reads_it(tmp_path, kind):
    whole = pictures.encode(pictures.image(), kind)
    draw = random.Random(0)
    damaged = [whole, *(whole[:cut] for cut in range(0, len(whole), len(whole) // 20)), whole + b"\0\0", whole + b"x"]
    for _ in range(30):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        damaged.append(bytes(content))
    members = [member for row, content in enumerate(damaged) for member in _sample(f"{row:05d}", content)]
    report = verify(*_shard(tmp_path, members, []))
    usable = set(report.index.column("key").to_pylist())
    for row, content in enumerate(damaged):
        try:
            reader.decode(content, 32)
        except reader.BadSampleError:
            assert f"{row:05d}" not in usable, row
        else:
            assert f"{row:05d}" in usable, row


def test_flags_are_counted_of_usable_samples(tmp_path, jpeg):
    members, rows = _good(jpeg, 3)
    tar, parquet = _shard(tmp_path, members[:-3], rows)
    flags = pa.array([["turned", "hash_mismatch"], ["turned"], ["turned"]])
    pq.write_table(pq.read_table(parquet).append_column("flags", flags), parquet)
    report = verify(tar, parquet)
    assert report.flags == {"hash_mismatch": 1, "turned": 2}
    assert report.failed == {"truncated_tar": 1}
