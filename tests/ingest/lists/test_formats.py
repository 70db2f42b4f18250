"""Hostile and odd files of each format: every row stays a row, and what cannot be read is an error that names the file."""

import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import SHARED_DATA

from ingest.lists import files, formats
from ingest.lists.files import ROW_BYTES
from ingest.lists.sources import open_list, read_url_list
from roclip.errors import UrlListError

LAION = SHARED_DATA / "urls" / "laion-style-10000.parquet"


def rows_of(folder, name, content, **arguments):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    urls = open_list(str(path), **arguments)
    return [tuple(row.values()) for part in urls.parts(7) for row in part.table.to_pylist()]


def table_rows(folder, table, **arguments):
    pq.write_table(pa.table(table), folder / "l.parquet")
    urls = open_list(str(folder / "l.parquet"), **arguments)
    return [row for part in urls.parts(7) for row in part.table.to_pylist()]


def error_of(folder, name, content, **arguments):
    with pytest.raises(UrlListError) as error:
        rows_of(folder, name, content, **arguments)
    assert name in str(error.value)
    return str(error.value)


# ---- csv and tsv ----------------------------------------------------------------------------------------------


def test_csv_row_of_another_length_stays_a_row_without_a_url(tmp_path):
    content = b"url,caption,x\nh1,c1,1\n\nh2,too,many,columns\nfew\xff\nh3,c3,3\nh4\n"
    assert rows_of(tmp_path, "l.csv", content, columns=["x"]) == [
        ("h1", "c1", "1"), ("", "", None), ("", "", None), ("h3", "c3", "3"), ("", "", None)
    ]  # fmt: skip


@pytest.mark.parametrize("block_bytes", [64, 300, 2**20])
def test_csv_rows_keep_their_numbers_when_many_are_malformed(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(formats, "BLOCK_BYTES", block_bytes)
    lines = [f"u{n},c{n}" if n % 3 else f"u{n}" for n in range(200)]
    rows = rows_of(tmp_path, "l.csv", "\n".join(["url,caption", *lines]))
    assert rows == [(f"u{n}", f"c{n}") if n % 3 else ("", "") for n in range(200)]


def test_csv_of_malformed_rows_alone_keeps_their_number(tmp_path):
    assert rows_of(tmp_path, "l.csv", "url,caption\n" + "x\n" * 10) == [("", "")] * 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("l.csv", b'\xef\xbb\xbfurl,caption\r\nh1,"two\r\nlines, and ""quotes"""\r\n\r\nh2,\r\n'),
        ("l.tsv", b'url\tcaption\nh1\t"two\r\nlines, and ""quotes"""\nh2\t""'),
    ],
)
def test_quotes_line_ends_and_byte_order_marks_are_understood(tmp_path, name, content):
    assert rows_of(tmp_path, name, content) == [("h1", 'two\r\nlines, and "quotes"'), ("h2", "")]


def test_csv_words_for_nothing_are_captions(tmp_path):
    rows = rows_of(tmp_path, "l.csv", "url,caption\n1,NULL\n2,nan\n3,true\n")
    assert rows == [("1", "NULL"), ("2", "nan"), ("3", "true")]


def test_csv_row_that_is_longer_than_any_names_the_file_and_the_row(tmp_path):
    long = b"x" * (3 * ROW_BYTES)
    message = error_of(tmp_path, "l.csv", b"url,caption\nh1,c\n" + b'h2,"' + long + b'"\n')
    assert "from row" in message


# ---- jsonl and json -------------------------------------------------------------------------------------------


def test_jsonl_line_that_is_no_object_stays_a_row(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"url": "h1", "caption": "c1"}',
        b"",
        b"5",
        b'{"url": "h2", "caption": "\\ud800 and \xff and \\u0000"}',
        b'{"url": "h3", ',
        b"[" * 100_000,
        b'{"url": 7, "caption": null}',
        b'{"caption": "no url"}',
    ]
    assert rows_of(tmp_path, "l.jsonl", b"\r\n".join(lines)) == [
        ("h1", "c1"), ("", ""), ("h2", "? and � and \0"), ("", ""), ("", ""), ("7", ""), ("", "no url")
    ]  # fmt: skip


def test_json_carries_values_with_the_type_that_the_first_rows_have(tmp_path):
    values = [
        {"i": 1, "f": 1, "b": True, "s": "x", "o": {"a": [1]}},
        {"i": 2, "f": 0.5, "b": None, "s": "y", "o": None},
    ]
    odd = {"i": "x", "f": "x", "b": 1, "s": 3, "o": 4}
    many = [values[n % 2] for n in range(1000)] + [odd]
    content = json.dumps([{"url": "h", "caption": "c", **row} for row in many])
    rows = rows_of(tmp_path, "l.json", content, columns=["i", "f", "b", "s", "o"])
    assert rows[0][2:] == (1, 1.0, True, "x", '{"a": [1]}')
    assert rows[1][2:] == (2, 0.5, None, "y", None)
    assert rows[1000][2:] == (None, None, None, "3", "4")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("lists", [True, False])
def test_json_of_columns_is_read_as_pandas_writes_it(tmp_path, indent, lists):
    count = 5000
    columns = {
        "id": range(count),
        "caption": [f"c{n}" if n % 2 else None for n in range(count)],
        "url": [f"http://h/{n}" for n in range(count)],
    }
    content = {
        name: list(values) if lists else {str(n): value for n, value in enumerate(values)}
        for name, values in columns.items()
    }
    rows = rows_of(tmp_path, "l.json", json.dumps(content, indent=indent), columns=["id"])
    assert rows == [(f"http://h/{n}", f"c{n}" if n % 2 else "", n) for n in range(count)]
    assert open_list(str(tmp_path / "l.json")).rows == count


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"url": "h", "caption": "c"}\n{"url": "h", "caption": "c"}\n', "a jsonl one object per line"),
        ('[{"url": "h", "caption": "c"}', "but the end"),
        ('[{"url": "h", "caption": "c"}, {"url": ', "no JSON value at character 31"),
        ('[{"url": "h", "caption": "c"}] 7', "more than one value"),
        ('{"url": ["a", "b"], "caption": ["c"]}', "columns of one length"),
        ('{"url": {"0": "a", "1": "b"}, "caption": {"1": "b", "0": "a"}}', "not of the same rows"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_cannot_be_taken_apart_says_where(tmp_path, content, words):
    assert words in error_of(tmp_path, "l.json", content)


# ---- txt, and what all text formats share ---------------------------------------------------------------------


def test_txt_has_a_url_a_line(tmp_path):
    content = b"\xef\xbb\xbfhttp://a\r\n\r\n  ../../etc/passwd \nb\xff\0c\n" + b"x" * (ROW_BYTES + 5) + b"\nlast"
    rows = rows_of(tmp_path, "l.txt", content)
    assert rows == [(url, "") for url in ("http://a", "../../etc/passwd", "b�\0c", "", "last")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_caption_of_ten_megabytes_is_kept_as_it_is(tmp_path, kind):
    caption = "é" * (5 * 10**6)
    if kind == "parquet":
        rows = [tuple(row.values()) for row in table_rows(tmp_path, {"url": ["a", "b"], "caption": [caption, "c"]})]
    elif "json" in kind:
        objects = [{"url": "a", "caption": caption}, {"url": "b", "caption": "c"}]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in objects)
        rows = rows_of(tmp_path, f"l.{kind}", lines if kind == "jsonl" else json.dumps(objects))
    else:
        mark = "," if kind == "csv" else "\t"
        rows = rows_of(tmp_path, f"l.{kind}", f"url{mark}caption\na{mark}{caption}\nb{mark}c\n")
    assert rows == [("a", caption), ("b", "c")]


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.txt", "l.csv.gz"])
def test_utf16_is_refused(tmp_path, name):
    content = "url,caption\nh,c\n".encode("utf-16")
    assert "Save it as UTF-8" in error_of(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)


@pytest.mark.parametrize(
    ("name", "content"),
    [("l.parquet", b"PAR1"), ("l.csv.gz", b"no gzip"), ("l.csv.zst", b"no zstd"), ("l.json", b"[1,")],
)
def test_damaged_file_is_named(tmp_path, name, content):
    assert "cannot be read" in error_of(tmp_path, name, content)


@pytest.mark.parametrize("name", ["l.csv.gz", "l.jsonl.zst", "l.txt.gz", "l.json.gz"])
def test_cut_off_file_is_an_error_and_not_a_shorter_list(tmp_path, name):
    rows = [{"url": f"http://a.example/{n * 7919 % 100_003}", "caption": str(n)} for n in range(60_000)]
    if ".json." in name:
        text = json.dumps(rows)
    elif ".jsonl" in name:
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "\n".join(["url,caption", *(f"{row['url']},{row['caption']}" for row in rows)])
    packed = (
        gzip.compress(text.encode()) if name.endswith("gz") else pa.compress(text.encode(), codec="zstd").to_pybytes()
    )
    message = error_of(tmp_path, name, packed[:-20])
    assert "from row" in message
    assert "Truncated compressed stream" in message


@pytest.mark.parametrize("name", ["l.gz", "l.zst"])
def test_files_glued_together_are_read_to_the_end(tmp_path, name):
    pieces = [b"url,caption\na,1\n", b"b,2\n", b"c,3\n"]
    packed = [
        gzip.compress(piece) if name.endswith("gz") else pa.compress(piece, codec="zstd").to_pybytes()
        for piece in pieces
    ]
    rows = rows_of(tmp_path, name.replace("l.", "l.csv."), b"".join(packed))
    assert rows == [("a", "1"), ("b", "2"), ("c", "3")]


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.txt", "l.json", "l.parquet"])
@pytest.mark.parametrize("shrinks", [True, False])
def test_file_that_changed_since_it_was_listed_is_an_error(tmp_path, name, shrinks):
    path = tmp_path / name
    rows = [{"url": f"http://a.example/{n}", "caption": "c"} for n in range(100)]

    def write(rows):
        if name == "l.parquet":
            return pq.write_table(pa.Table.from_pylist(rows), path)
        if "json" in name:
            lines = [json.dumps(row) for row in rows]
            return path.write_text("\n".join(lines) if name == "l.jsonl" else f"[{','.join(lines)}]")
        return path.write_text("url,caption\n" + "".join(f"{row['url']},c\n" for row in rows))

    write(rows)
    urls = open_list(str(path))
    write(rows[:-9] if shrinks else rows * 2)
    with pytest.raises(UrlListError, match="it changed in the meantime"):
        list(urls.parts(10))


def test_parquet_of_the_same_size_and_other_rows_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), path)
    urls = open_list(str(path))
    pq.write_table(pa.table({"url": ["a"] * 5, "caption": ["b"] * 5}), path)
    monkeypatch.setattr(files, "_changed", lambda *_: None)
    monkeypatch.setattr(formats, "open_bytes", lambda file: file.fs.open(file.path, "rb"))
    with pytest.raises(UrlListError, match="it had 1 rows when ingest began and has 5 now"):
        list(urls.parts(10))


# ---- columns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "caption"), [("url", "caption"), ("URL", "TEXT"), ("image_url", "text")])
def test_well_known_column_names_are_found(tmp_path, url, caption):
    assert table_rows(tmp_path, {caption: ["c"], "x": [1], url: ["h"]}) == [{"url": "h", "caption": "c"}]


@pytest.mark.parametrize("name", ["l.csv", "l.tsv", "l.jsonl", "l.json"])
def test_missing_column_names_the_file_what_it_has_and_what_may_be_meant(tmp_path, name):
    if "json" in name:
        line = '{"link": "h", "Captoin": "c"}'
        content = line if name == "l.jsonl" else f"[{line}]"
    else:
        content = "link,Captoin\nh,c\n".replace(",", "\t" if name == "l.tsv" else ",")
    message = error_of(tmp_path, name, content, url_col="link")
    assert "expected a column caption or TEXT or text, got link, Captoin. Did you mean Captoin?" in message
    assert "Set data.url_col" in error_of(tmp_path, name, content)
    message = error_of(tmp_path, name, content, url_col="link", caption_col="Captoin", columns=["lnk"])
    assert "expected a column lnk, got link, Captoin. Did you mean link? Set ingest.columns" in message


def test_files_of_a_list_may_differ_in_the_order_of_columns_only(tmp_path):
    pq.write_table(pa.table({"url": ["a"], "caption": ["1"], "x": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("y,caption,url\n,2,b\n")
    assert read_url_list(str(tmp_path)).to_pylist() == [{"url": "a", "caption": "1"}, {"url": "b", "caption": "2"}]
    with pytest.raises(UrlListError, match=r"b\.csv: expected the columns of the list's first file, but x is missing"):
        open_list(str(tmp_path), columns=["x"])
    (tmp_path / "c.csv").write_text("URL,caption\nc,3\n")
    with pytest.raises(UrlListError, match=r"c\.csv.*url is missing; it has URL, caption"):
        open_list(str(tmp_path))


def test_column_of_two_meanings_is_refused(tmp_path):
    assert "got two of that name" in error_of(tmp_path, "l.csv", "url,caption,url\na,b,c\n")


def test_carried_columns_keep_their_type_or_become_text(tmp_path):
    columns = {
        "url": ["h"], "caption": ["c"], "i": pa.array([3], pa.int32()), "f": [0.5], "b": [True], "l": [[[1.5], []]],
        "d": pa.array(["x"]).dictionary_encode(), "t": pa.array([0], pa.timestamp("ms")), "n": pa.nulls(1),
        "m": [decimal.Decimal("1.50")], "raw": [b"\xff!"], "width": [640], "URL": ["again"],
    }  # fmt: skip
    (row,) = table_rows(tmp_path, columns, columns=[*list(columns)[2:], "i"])
    assert row == {
        "url": "h", "caption": "c", "i": 3, "f": 0.5, "b": True, "l": [[1.5], []], "d": "x", "t": "1970-01-01 00:00:00.000",
        "n": None, "m": "1.50", "raw": "�!", "list_width": 640, "URL": "again",
    }  # fmt: skip
    urls = open_list(str(tmp_path / "l.parquet"), columns=["i", "f"])
    (part,) = urls.parts(10)
    assert part.table.schema.types[2:] == [pa.int32(), pa.float64()]


def test_carried_column_has_the_type_that_holds_all_files(tmp_path):
    for n, values in enumerate(
        [pa.nulls(1), pa.array([3], pa.int64()), pa.array([0.5]), pa.array([None], pa.float64())]
    ):
        pq.write_table(pa.table({"url": ["h"], "caption": ["c"], "w": values}), tmp_path / f"{n}.parquet")
    (part,) = open_list(str(tmp_path), columns=["w"]).parts(10)
    assert part.table["w"].to_pylist() == [None, 3.0, 0.5, None]
    (tmp_path / "x.csv").write_text("url,caption,w\nh,c,1\n")
    with pytest.raises(
        UrlListError, match=r"x\.csv: expected double in the column w, as in the files before, got string"
    ):
        open_list(str(tmp_path), columns=["w"])


def test_carried_columns_that_would_bear_one_name_are_refused(tmp_path):
    columns = {"url": ["h"], "caption": ["c"], "width": [1], "list_width": [2]}
    with pytest.raises(UrlListError, match="width would be stored as list_width, which is another column"):
        table_rows(tmp_path, columns, columns=["width", "list_width"])


def test_columns_of_no_use_are_refused(tmp_path):
    with pytest.raises(UrlListError, match="expected text in the column url, got int64"):
        table_rows(tmp_path, {"url": [1], "caption": ["c"]})
    with pytest.raises(UrlListError, match=r"expected values in the column caption that convert to string, got list"):
        table_rows(tmp_path, {"url": ["h"], "caption": [["c"]]})
    with pytest.raises(UrlListError, match="got lists or objects"):
        rows_of(tmp_path, "l.jsonl", '{"url": "h", "caption": ["c"]}')
    with pytest.raises(UrlListError, match="got map"):
        table_rows(
            tmp_path,
            {"url": ["h"], "caption": ["c"], "m": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))},
            columns=["m"],
        )
    with pytest.raises(UrlListError, match="but a txt has URLs only"):
        rows_of(tmp_path, "l.txt", "h\n", columns=["x"])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view()])
def test_text_that_is_no_utf8_is_replaced_in_a_parquet_too(tmp_path, kind):
    raw = pa.array([b"a\xff\0", None, "é".encode()], pa.binary())
    texts = pa.StringArray.from_buffers(3, *raw.buffers()[1:], raw.buffers()[0])  # as a careless writer would
    column = raw if kind == pa.binary() else texts.cast(kind)
    rows = table_rows(tmp_path, {"url": column, "caption": column})
    assert rows == [{"url": text, "caption": text} for text in ("a�\0", "", "é")]


def test_captions_that_are_numbers_become_text(tmp_path):
    assert table_rows(tmp_path, {"url": ["h"], "caption": [0.5]}) == [{"url": "h", "caption": "0.5"}]


def test_hash_columns_become_what_is_expected(tmp_path):
    md5, sha256 = "0" * 30 + "aB", "F" * 64
    columns = {
        "url": ["h"] * 3, "caption": ["c"] * 3, "MD5": [f" {md5} ", "", None],
        "sha256": [bytes.fromhex(sha256), sha256.encode(), None], "pHash": pa.array([-1, None, 5], pa.int64()),
    }  # fmt: skip
    expected = [
        (md5.lower(), sha256.lower(), 2**64 - 1),
        (None, sha256.lower(), None),
        (None, None, 5),
    ]
    names = ("expected_md5", "expected_sha256", "expected_phash")
    rows = table_rows(tmp_path, columns)
    assert [tuple(row[name] for name in names) for row in rows] == expected
    assert list(rows[0]) == ["url", "caption", *names]
    assert list(table_rows(tmp_path, columns, hashes=False)[0]) == ["url", "caption"]
    text = rows_of(tmp_path, "l.csv", "url,caption,phash\nh,c,ffffffffffffffff\nh,c,no\n")
    assert [row[2] for row in text] == [2**64 - 1, None]
    with pytest.raises(UrlListError, match="column phash that convert to uint64, got double"):
        table_rows(tmp_path, {"url": ["h"], "caption": ["c"], "phash": [0.5]})


@pytest.mark.data
@pytest.mark.skipif(not LAION.exists(), reason=f"needs {LAION}")
def test_list_in_the_style_of_laion_is_read_whole():
    parts = list(open_list(str(LAION)).parts(1000))
    assert [len(part.table) for part in parts] == [1000] * 10
    assert parts[4].table.to_pylist()[674] == {"url": "UNLIKELY", "caption": "0.32893747091293335"}
