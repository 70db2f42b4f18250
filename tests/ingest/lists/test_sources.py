import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.lists import formats, json_rows, sources
from ingest.lists.sources import open_list, read_url_list, split
from roclip.errors import UrlListError

URLS = ["http://a.example/1.jpg", "http://b.example/2.jpg?x=1,2", "http://c.example/3.jpg"]
CAPTIONS = ["a cat", 'says "hi", twice', ""]
FORMATS = ("parquet", "csv", "tsv", "jsonl", "json", "txt")
KINDS = (*FORMATS, *(f"{name}.{ending}" for name in FORMATS[1:] for ending in ("gz", "zst")))


def content_of(kind, columns):
    """A file of these columns (name -> texts), as bytes."""
    name, _, ending = kind.partition(".")
    rows = list(zip(*columns.values(), strict=True))
    if name == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, row_group_size=max(2, len(rows) // 20))
        return sink.getvalue().to_pybytes()
    if name in ("csv", "tsv"):
        mark = "," if name == "csv" else "\t"
        quoted = [mark.join('"' + text.replace('"', '""') + '"' for text in row) for row in [tuple(columns), *rows]]
        text = "".join(f"{line}\n" for line in quoted)
    elif name == "jsonl":
        text = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    elif name == "json":
        text = json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=1)
    else:
        text = "".join(f"{url}\n" for url in columns["url"])
    content = text.encode()
    if ending == "gz":
        return gzip.compress(content)
    return pa.compress(content, codec="zstd").to_pybytes() if ending == "zst" else content


def write(path, urls=URLS, captions=CAPTIONS, *, url_col="url", caption_col="caption", **further):
    columns = {"id": [str(n) for n in range(len(urls))], caption_col: captions, url_col: urls, **further}
    if ".txt" in path.name:
        columns = {"url": urls}
    path.write_bytes(content_of(path.name.partition(".")[2], columns))
    return str(path)


def rows_of(urls, samples_per_shard, start_row=0):
    return [row for part in urls.parts(samples_per_shard, start_row) for row in part.table.to_pylist()]


@pytest.mark.parametrize("kind", KINDS)
def test_list_is_read_the_same_from_every_format(tmp_path, kind):
    path = write(tmp_path / f"list.{kind}", url_col="link", caption_col="words")
    table = read_url_list(path, url_col="link", caption_col="words")
    assert table.schema == pa.schema([("url", pa.string()), ("caption", pa.string())])
    assert table.column("url").to_pylist() == URLS
    assert table.column("caption").to_pylist() == ([""] * 3 if kind.startswith("txt") else CAPTIONS)


def test_folder_and_glob_are_read_in_the_order_of_names(tmp_path):
    for name in ("b.csv", "a.parquet", "c.txt", "_temporary.csv", ".hidden.csv"):
        write(tmp_path / name)
    (tmp_path / "README").write_text("not a list")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "d.csv")
    table = read_url_list(str(tmp_path))
    assert table.column("caption").to_pylist() == [*CAPTIONS, *CAPTIONS, "", "", ""]
    assert read_url_list(str(tmp_path / "[ab].*")).to_pylist() == table.slice(0, 6).to_pylist()
    assert len(read_url_list(str(tmp_path / "**" / "[abd].*"))) == 9


def test_several_lists_are_read_in_the_order_given(tmp_path):
    (tmp_path / "more").mkdir()
    last = write(tmp_path / "a.csv", ["last"], ["l"])
    write(tmp_path / "more" / "x.jsonl", ["first"], ["f"])
    urls = open_list(f"{tmp_path / 'more'}::{last}")
    assert [row["url"] for row in rows_of(urls, 10)] == ["first", "last"]
    assert urls.name == "more-and-1-more"


def test_a_file_named_twice_is_an_error(tmp_path):
    path = write(tmp_path / "a.csv")
    with pytest.raises(UrlListError, match=r"expected each file once, got .*a\.csv twice"):
        open_list(f"{path}::{tmp_path}")


def test_other_stores_are_read_by_their_url():
    import fsspec

    with fsspec.open("memory://lists/list.csv", "wb") as file:
        file.write(b"url,caption\nhttp://a.example/1.jpg,a cat\n")
    assert read_url_list("memory://lists/list.csv").to_pylist() == [{"url": URLS[0], "caption": "a cat"}]
    assert open_list("memory://lists").identity["files"] == [["list.csv", 41, None]]


@pytest.mark.parametrize("limit", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_limit_keeps_the_first_rows_across_files(tmp_path, limit, kind):
    write(tmp_path / f"a.{kind}")
    write(tmp_path / f"b.{kind}")
    assert read_url_list(str(tmp_path), limit=limit).column("url").to_pylist() == (URLS + URLS)[:limit]
    assert open_list(str(tmp_path), limit=limit).rows == (min(limit, 6) if kind == "parquet" else None)


def test_rows_without_a_url_keep_their_place(tmp_path):
    pq.write_table(pa.table({"url": [None, "http://a.example/"], "caption": ["a", None]}), tmp_path / "l.parquet")
    rows = read_url_list(str(tmp_path / "l.parquet")).to_pylist()
    assert rows == [{"url": "", "caption": "a"}, {"url": "http://a.example/", "caption": ""}]


@pytest.mark.parametrize("name", ["none.csv", "none", "*.parquet", "no/such/folder/"])
def test_missing_list_is_an_error(tmp_path, name):
    with pytest.raises(UrlListError, match="no such URL list"):
        open_list(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [("l.csv", "url,caption\n"), ("l.csv", "a"), ("l.txt", "\n\n"), ("l.jsonl", ""), ("l.csv", ""), ("l.json", "[]")],
)
def test_empty_list_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UrlListError, match="empty list"):
        open_list(str(tmp_path / name))


def test_an_empty_file_among_others_has_no_columns_to_miss(tmp_path):
    (tmp_path / "a.csv").write_text("")
    write(tmp_path / "b.parquet")
    assert rows_of(open_list(str(tmp_path)), 2)[0]["url"] == URLS[0]


def test_unknown_format_names_the_known_ones(tmp_path):
    (tmp_path / "list.xlsx").write_text("x")
    with pytest.raises(UrlListError, match=r"expected parquet, csv.*got list\.xlsx"):
        open_list(str(tmp_path / "list.xlsx"))


# ---- parts ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), max_size=6)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_parts_are_those_of_the_rows_whatever_holds_them(data, tmp_path_factory):
    rows = data.draw(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    per_shard = data.draw(st.integers(1, 12))
    start = data.draw(st.integers(0, len(rows)))
    folder = tmp_path_factory.mktemp("list")
    kinds = st.sampled_from([kind for kind in KINDS if not kind.startswith("txt")])
    for at, (first, end) in enumerate(zip([0, *cuts], [*cuts, len(rows)], strict=True)):
        url, caption, score = ([row[n] for row in rows[first:end]] for n in range(3))
        columns = data.draw(st.permutations(list({"url": url, "caption": caption, "score": score}.items())))
        kind = data.draw(kinds)
        if first == end and "json" not in kind:  # a parquet without rows has columns of no type
            columns = (
                [(name, pa.array(values, pa.string())) for name, values in columns] if kind == "parquet" else columns
            )
        (folder / f"{at}.{kind}").write_bytes(content_of(kind, dict(columns)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", data.draw(st.integers(1, 9)))
        patch.setattr(formats, "BLOCK_BYTES", data.draw(st.integers(200, 400)))
        patch.setattr(json_rows, "BATCH_ROWS", data.draw(st.integers(1, 9)))
        parts = list(open_list(str(folder), columns=["score"]).parts(per_shard, start))
    expected = [dict(zip(("url", "caption", "score"), row, strict=True)) for row in rows[start:]]
    assert [row for part in parts for row in part.table.to_pylist()] == expected
    assert all(len(part.table) == per_shard for part in parts[:-1])
    first = -(-start // per_shard)
    assert [part.number for part in parts] == list(range(first, first + len(parts)))


@pytest.mark.parametrize("kind", ["parquet", "csv.gz", "jsonl"])
def test_part_takes_nothing_along_when_it_is_pickled(tmp_path, kind):
    path = write(tmp_path / f"l.{kind}", [f"http://a.example/{n}" for n in range(5000)], ["c"] * 5000)
    part = list(open_list(path).parts(10))[7]
    assert len(pickle.dumps(part)) < 5000
    assert part.table["url"].num_chunks == 1


def test_rows_before_the_start_are_skipped_by_row_groups(tmp_path, monkeypatch):
    for n in range(3):
        write(tmp_path / f"{n}.parquet", [f"{n}-{row}" for row in range(10)], ["c"] * 10)  # groups of two rows
    urls = open_list(str(tmp_path))
    opened, groups = [], []
    real = formats.pq.ParquetFile

    class Spied(real):
        def iter_batches(self, **options):
            groups.append(options["row_groups"])
            return super().iter_batches(**options)

    monkeypatch.setattr(formats.pq, "ParquetFile", Spied)
    monkeypatch.setattr(
        sources, "read_rows", lambda file, *rest: opened.append(file.name) or formats.read_rows(file, *rest)
    )
    assert [row["url"] for row in rows_of(urls, 4, 15)][:2] == ["1-5", "1-6"]
    assert opened == ["1.parquet", "2.parquet"]
    assert groups == [[2, 3, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_start_beyond_the_end_is_an_error_and_at_the_end_there_is_no_part(tmp_path, kind):
    urls = open_list(write(tmp_path / f"l.{kind}"))
    assert list(urls.parts(2, 3)) == []
    with pytest.raises(UrlListError, match="a list of 3"):
        list(urls.parts(2, 4))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
def test_read_frac_goes_from_nothing_to_all(tmp_path, kind):
    for name in "ab":
        write(tmp_path / f"{name}.{kind}", [f"http://a.example/{n}" for n in range(3000)], ["c"] * 3000)
    urls = open_list(str(tmp_path))
    assert urls.read_frac == 0
    walk = urls.parts(1000)
    fracs = [urls.read_frac for _ in walk]
    assert 0 < fracs[0] < 1
    assert fracs == sorted(fracs)
    assert urls.read_frac == 1


def test_rows_are_known_where_footers_tell(tmp_path):
    write(tmp_path / "a.parquet")
    assert open_list(str(tmp_path)).rows == 3
    write(tmp_path / "b.csv")
    assert open_list(str(tmp_path)).rows is None


@pytest.mark.parametrize("kind", ["parquet", "txt"])
def test_more_shards_than_have_numbers_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sources, "SHARD_DIGITS", 0)
    urls = open_list(write(tmp_path / f"l.{kind}"))
    with pytest.raises(UrlListError, match="expected at most 1 shards"):
        list(urls.parts(2))


def test_part_that_is_too_large_for_memory_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    urls = open_list(write(tmp_path / "l.csv", ["u"] * 20, ["c" * 100] * 20))
    assert len(list(urls.parts(5))) == 4
    with pytest.raises(UrlListError, match=r"rows of part 0\. Set a lower ingest\.samples_per_shard"):
        list(urls.parts(20))


@pytest.mark.parametrize(
    ("urls", "name"),
    [
        ("lists/laion 2B!.parquet", "laion-2B"),
        ("s3://bucket/cc3m/*.csv.gz", "cc3m"),
        ("lists/", "lists"),
        ("*.csv", "list"),
        ("a/b.tsv.zst::c.csv::d.csv", "b-and-2-more"),
        ("x" * 300 + ".csv", "x" * 40),
    ],
)
def test_name_is_short_and_safe(urls, name):
    assert sources._name(urls) == name


# ---- the same list, a grown one, another one ------------------------------------------------------------------


def test_digest_is_of_names_sizes_columns_and_limit(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.csv")
    path = str(tmp_path / "one")
    same = open_list(path)
    assert same.digest == open_list(str(tmp_path / "two")).digest
    others = [open_list(path, limit=2), open_list(path, columns=["id"]), open_list(path, url_col="id")]
    write(tmp_path / "two" / "a.csv", [*URLS[:2], "http://c.example/33.jpg"])
    assert len({same.digest, *(other.digest for other in [*others, open_list(str(tmp_path / "two"))])}) == 5


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
@pytest.mark.parametrize("how", ["file", "rows", "limit"])
def test_grown_list_has_the_same_parts_from_an_old_row_on(tmp_path, kind, how):
    urls = [f"http://a.example/{n}" for n in range(20)]
    write(tmp_path / f"a.{kind}", urls[:7], ["c"] * 7)
    write(tmp_path / f"b.{kind}", urls[7:13], ["c"] * 6)
    old = open_list(str(tmp_path), limit=11 if how == "limit" else 0)
    ingested = rows_of(old, 5)
    if how == "rows":
        write(tmp_path / f"b.{kind}", urls[7:], ["c"] * 13)
    else:
        write(tmp_path / f"c.{kind}", urls[13:], ["c"] * 7)
    new = open_list(str(tmp_path))
    if how == "limit":
        (tmp_path / f"c.{kind}").unlink()
        new = open_list(str(tmp_path))
    assert new.digest != old.digest
    assert ingested + rows_of(new, 5, len(ingested)) == rows_of(new, 20)


# ---- split ----------------------------------------------------------------------------------------------------


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
