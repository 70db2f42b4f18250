"""The manifest, sample keys and atomic writes."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import environment

from roclip.data.shards import Manifest, ShardRecord, digest, index_path, read_index, sample_ids, sample_key, tar_path
from roclip.errors import ShardError
from roclip.storage import sha256_file, write_atomic

NEW = ["tar", "source", "rows_sha256", "retried"]


def record(number: int, **changes) -> ShardRecord:
    """A record of shard `number`."""
    values = {
        "name": f"{number:05d}.tar",
        "samples": 9,
        "bytes": 100,
        "sha256": f"{number:064x}",
        "index_sha256": "0" * 64,
        "urls": 10,
        "failed": {"timeout": 1},
    }
    return ShardRecord(**{**values, **changes})


def test_records_are_sorted_by_name_when_published_out_of_order(tmp_path: Path):
    manifest = Manifest(tmp_path)
    for number in (2, 0, 1):
        manifest.publish(record(number))
    assert manifest.records() == (record(0), record(1), record(2))


def test_shard_exists_once_when_published_twice(tmp_path: Path):
    manifest = Manifest(tmp_path)
    manifest.publish(record(0))
    manifest.publish(record(0))
    assert manifest.records() == (record(0),)


def test_manifest_is_empty_when_there_is_no_folder(tmp_path: Path):
    assert Manifest(tmp_path / "nothing").records() == ()
    assert Manifest(tmp_path / "nothing").summary is None


def test_end_is_known_until_reopened_when_finished(tmp_path: Path):
    manifest = Manifest(tmp_path)
    manifest.publish(record(0))
    assert manifest.summary is None
    manifest.finish({"urls": 10})
    assert Manifest(tmp_path).summary == {"urls": 10}
    assert manifest.records() == (record(0),)
    manifest.reopen()
    manifest.reopen()
    assert manifest.summary is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "00000.tar"}', '{"nmae": 1}'])
def test_broken_record_is_named_when_read(tmp_path: Path, content: str):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "00000.json").write_text(content)
    with pytest.raises(ShardError, match=r"manifest/00000\.json: not a shard record"):
        Manifest(tmp_path).records()


def test_half_written_record_is_not_seen_when_its_writer_died(tmp_path: Path):
    manifest = Manifest(tmp_path)
    manifest.publish(record(0))
    (tmp_path / "manifest" / ".00001.json.abc").write_text("{")
    assert manifest.records() == (record(0),)


def test_digest_depends_on_names_and_contents_only_when_computed():
    assert digest([record(0), record(1)]) == digest([record(1), record(0)])
    assert digest([record(0)]) == digest([record(0, samples=1, failed={})])
    assert digest([record(0)]) != digest([record(0, sha256="f" * 64)])
    assert digest([record(0)]) != digest([record(0), record(1)])


@pytest.mark.parametrize(
    ("row", "samples_per_shard", "key"),
    [
        (0, 10_000, "000000000"),
        (9_999, 10_000, "000009999"),
        (10_000, 10_000, "000010000"),
        (1_234, 1_000, "00001234"),
        (205, 100, "0000205"),
        (55, 50, "0000105"),
    ],
)
def test_sample_key_names_shard_and_row_when_shards_have_any_size(row: int, samples_per_shard: int, key: str):
    assert sample_key(row, samples_per_shard) == key


def test_sample_keys_are_unique_when_many():
    keys = [sample_key(row, 50) for row in range(1000)]
    assert len(set(keys)) == 1000
    assert keys == sorted(keys)


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")
def test_sample_key_matches_img2dataset_when_it_names_a_row():
    from img2dataset.downloader import compute_key

    for samples_per_shard in (50, 100, 1000, 10_000):
        width = len(str(samples_per_shard - 1))
        for row in (0, 1, 49, 50, 12_345):
            shard, position = divmod(row, samples_per_shard)
            theirs = compute_key(position, shard, width, 5)
            assert sample_key(row, samples_per_shard) == theirs


def test_sha256_matches_hashlib_when_the_file_is_larger_than_a_piece(tmp_path: Path):
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_index_lies_beside_the_tar_when_named(tmp_path: Path):
    assert index_path(tmp_path, "00003.tar") == tmp_path / "00003.index.parquet"


def test_write_atomic_makes_folders_and_leaves_nothing_else_when_done(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_atomic_keeps_the_old_file_when_the_new_content_is_wrong(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")  # a lone surrogate cannot be written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_sees_whole_contents_when_two_processes_write(tmp_path: Path):
    path = tmp_path / "file"
    write_atomic(path, "a" * 100_000)
    code = "import sys; from pathlib import Path; from roclip.data.shards import write_atomic\n"
    code += "for _ in range(40): write_atomic(Path(sys.argv[1]), sys.argv[2] * 100_000)"
    command = [sys.executable, "-c", code, str(path)]
    writers = [subprocess.Popen([*command, letter], env=environment()) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        seen.add((len(content), len(set(content))))
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen == {(100_000, 1)}
    assert list(tmp_path.iterdir()) == [path]


def test_packed_records_are_the_same_records(tmp_path):
    manifest = Manifest(tmp_path)
    records = (*map(record, range(4)), record(4, rows_sha256="ab", retried={"timeout": 3, "no_host": 1}))
    for each in records:
        manifest.publish(each)
    manifest.pack(at_least=6)
    assert len(list(manifest.folder.iterdir())) == 5
    manifest.pack(at_least=5)
    assert [path.suffix for path in manifest.folder.iterdir()] == [".parquet"]
    assert manifest.records() == records
    manifest.publish(record(5))
    manifest.finish({})
    assert Manifest(tmp_path).records() == (*records, record(5))
    assert manifest.get("00004.tar") == records[4]
    assert manifest.get("00005.tar") == record(5)
    assert manifest.get("00006.tar") is None


def test_a_kill_between_packing_and_cleaning_up_changes_nothing(tmp_path, monkeypatch):
    manifest = Manifest(tmp_path)
    for number in range(3):
        manifest.publish(record(number))
    before = manifest.records()

    def killed(path, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(tmp_path), "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            manifest.pack(at_least=1)
    assert Manifest(tmp_path).records() == before
    manifest.pack(at_least=1)
    assert len(list(manifest.folder.iterdir())) == 1
    assert Manifest(tmp_path).records() == before


def test_readers_see_every_record_while_others_are_published_and_packed(tmp_path):
    manifest, seen, done = Manifest(tmp_path), [], threading.Event()

    def read():
        reader = Manifest(tmp_path)
        while not done.is_set():
            seen.append([each.name for each in reader.records()])

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(200):
        manifest.publish(record(number))
        manifest.pack(at_least=7)
    done.set()
    thread.join()
    names = [record(number).name for number in range(200)]
    assert all(each == names[: len(each)] for each in seen)
    assert [len(each) for each in seen] == sorted(len(each) for each in seen)


def test_a_record_that_is_only_a_name_is_told(tmp_path):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "00007.json").symlink_to("nothing")
    with pytest.raises(ShardError, match=r"00007\.json: expected a record.*without a file behind it"):
        Manifest(tmp_path).records()


def test_a_broken_pack_is_named(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.publish(record(0))
    (manifest.folder / "pack-0.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ShardError, match=r"pack-0.parquet: not a pack"):
        manifest.records()


def test_records_of_before_tars_could_lie_elsewhere_are_read(tmp_path):
    manifest = Manifest(tmp_path)
    elsewhere = record(2, tar="s3://bucket/2.tar", source="s3://bucket/*.tar")
    for each in (record(0), record(1), elsewhere):
        manifest.publish(each)
    loose = manifest.folder / "00001.json"
    loose.write_text(
        json.dumps({name: value for name, value in json.loads(loose.read_text()).items() if name not in NEW})
    )
    manifest.pack(at_least=3)
    (pack,) = manifest.folder.iterdir()
    assert Manifest(tmp_path).records() == (record(0), record(1), elsewhere)
    pq.write_table(pq.read_table(pack).drop_columns(NEW), pack)
    assert Manifest(tmp_path).records() == (record(0), record(1), record(2))


def test_a_tar_lies_beside_its_index_or_where_its_record_says(tmp_path):
    assert tar_path(tmp_path, record(0)) == tmp_path / "00000.tar"
    assert tar_path(tmp_path, record(0, tar="/data/x.tar")) == Path("/data/x.tar")
    assert str(tar_path(tmp_path, record(0, tar="memory://data/x.tar"))) == "memory://data/x.tar"


def test_an_index_gives_the_columns_that_it_has(tmp_path):
    pq.write_table(pa.table({"key": ["07", "5"], "image_size": [1, 2]}), index_path(tmp_path, "0.tar"))
    table = read_index(tmp_path, "0.tar", ["key", "id"])
    assert table.column_names == ["key"]
    assert sample_ids(table) == [7, 5]
    assert sample_ids(table.append_column("id", [[3, 4]])) == [3, 4]
