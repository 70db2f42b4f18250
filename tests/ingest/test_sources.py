import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingest.sources import read_url_list, split
from roclip.errors import UrlListError

URLS = ["http://a.example/1.jpg", "http://b.example/2.jpg?x=1,2", "http://c.example/3.jpg"]
CAPTIONS = ["a cat", 'says "hi", twice', ""]
ROWS = list(zip(URLS, CAPTIONS, strict=True))


def _write(folder, name, url_col="url", caption_col="caption"):
    path = folder / name
    if name.endswith(".parquet"):
        table = {"id": [1, 2, 3], caption_col: [*CAPTIONS[:2], None], url_col: URLS}
        pq.write_table(pa.table(table), path)
        return path
    mark = "\t" if ".tsv" in name else ","
    if ".jsonl" in name:
        lines = [json.dumps({url_col: u, "id": 7, caption_col: c or None}) for u, c in ROWS]
    elif ".txt" in name:
        lines = URLS
    else:
        quoted = [f'7{mark}"{u}"{mark}"{c.replace(chr(34), chr(34) * 2)}"' for u, c in ROWS]
        lines = [mark.join(("id", url_col, caption_col)), *quoted]
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "txt", "csv.gz", "tsv.gz", "jsonl.gz", "txt.gz"])
def test_list_is_read_the_same_from_every_format(tmp_path, kind):
    path = _write(tmp_path, f"list.{kind}", "link", "text")
    table = read_url_list(str(path), url_col="link", caption_col="text")
    assert table.schema.names == ["url", "caption"]
    assert table.column("url").to_pylist() == URLS
    assert table.column("caption").to_pylist() == ([""] * 3 if kind.startswith("txt") else CAPTIONS)


def test_folder_and_glob_are_read_in_the_order_of_names(tmp_path):
    for name in ("b.csv", "a.parquet", "c.txt"):
        _write(tmp_path, name)
    (tmp_path / "README").write_text("not a list")
    table = read_url_list(str(tmp_path))
    assert table.column("caption").to_pylist() == [*CAPTIONS, *CAPTIONS, "", "", ""]
    assert read_url_list(str(tmp_path / "[ab].*")).equals(table.slice(0, 6))


def test_other_stores_are_read_by_their_url(tmp_path):
    import fsspec

    with fsspec.open("memory://lists/list.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert read_url_list("memory://lists/list.csv").to_pylist() == [{"url": URLS[0], "caption": "a cat"}]


@pytest.mark.parametrize("limit", [1, 3, 4, 6, 7])
def test_limit_keeps_the_first_rows_across_files(tmp_path, limit):
    _write(tmp_path, "a.csv")
    _write(tmp_path, "b.csv")
    assert read_url_list(str(tmp_path), limit=limit).column("url").to_pylist() == (URLS + URLS)[:limit]


def test_rows_without_a_url_keep_their_place(tmp_path):
    pq.write_table(pa.table({"url": [None, "http://a.example/"], "caption": ["a", None]}), tmp_path / "l.parquet")
    rows = read_url_list(str(tmp_path / "l.parquet")).to_pylist()
    assert rows == [{"url": "", "caption": "a"}, {"url": "http://a.example/", "caption": ""}]


@pytest.mark.parametrize("name", ["list.csv", "list.tsv.gz", "list.jsonl", "list.parquet"])
def test_missing_column_names_the_file_and_what_it_has(tmp_path, name):
    path = _write(tmp_path, name)
    with pytest.raises(UrlListError, match=r"TEXT missing") as error:
        read_url_list(str(path), caption_col="TEXT")
    assert name in str(error.value)
    assert "id" in str(error.value)
    assert "caption" in str(error.value)


@pytest.mark.parametrize("name", ["none.csv", "none", "*.parquet", "no/such/folder/"])
def test_missing_list_is_an_error(tmp_path, name):
    with pytest.raises(UrlListError, match="no such URL list"):
        read_url_list(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"), [("l.csv", "url,caption\n"), ("l.txt", "\n\n"), ("l.jsonl", ""), ("l.csv", "")]
)
def test_empty_list_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UrlListError, match="empty list"):
        read_url_list(str(tmp_path / name))


def test_unknown_format_names_the_known_ones(tmp_path):
    (tmp_path / "list.xlsx").write_text("x")
    with pytest.raises(UrlListError, match=r"expected parquet, csv.*got list\.xlsx"):
        read_url_list(str(tmp_path / "list.xlsx"))


@pytest.mark.parametrize(("name", "content"), [("l.parquet", b"PAR1"), ("l.csv.gz", b"no gzip"), ("l.jsonl", b"[1,")])
def test_damaged_list_names_the_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UrlListError, match=name):
        read_url_list(str(tmp_path / name))


@pytest.mark.parametrize(("rows", "per_shard"), [(1, 10), (10, 10), (11, 10), (7, 1), (25, 10)])
def test_split_gives_the_same_parts_and_every_row_once(rows, per_shard):
    table = pa.table({"url": [f"http://a.example/{n}" for n in range(rows)], "caption": [""] * rows})
    parts = split(table, per_shard)
    assert [part.number for part in parts] == list(range(-(-rows // per_shard)))
    assert all(len(part.table) == per_shard for part in parts[:-1])
    assert pa.concat_tables(part.table for part in parts).equals(table)
    assert [part.table for part in split(table, per_shard)] == [part.table for part in parts]


def test_split_refuses_more_shards_than_have_numbers():
    table = pa.table({"url": pa.nulls(100_001, pa.string()), "caption": pa.nulls(100_001, pa.string())})
    with pytest.raises(UrlListError, match=r"samples_per_shard to 2 or more"):
        split(table, 1)
