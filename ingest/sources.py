"""Reads lists of URLs and cuts them into parts: one part becomes one shard. Same list, same parts.

A row is never dropped, not even one without a URL: the row's number is the sample's key
(`roclip.shards.sample_key`).
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv
from pyarrow import json as arrow_json

from roclip.errors import UrlListError
from roclip.shards import SHARD_DIGITS

SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string())])
FORMATS = ("parquet", "csv", "tsv", "jsonl", "txt")
_NAMES = (*(f".{name}" for name in FORMATS), *(f".{name}.gz" for name in FORMATS if name != "parquet"))


@dataclass(frozen=True)
class Part:
    """The rows that one shard stands for."""

    number: int
    """Number of the shard, from 0."""
    table: pa.Table
    """Columns `url` and `caption`; at most `samples_per_shard` rows."""


def read_url_list(path: str, *, url_col: str = "url", caption_col: str = "caption", limit: int = 0) -> pa.Table:
    """All rows of a URL list, as a table of the string columns `url` and `caption`; a missing value is "".

    `path` is a file, a folder or a glob on any fsspec store, such as `s3://bucket/urls/*.parquet`. Files are
    read in the order of their names. Formats: parquet, and csv, tsv, jsonl, txt with or without `.gz`. A txt
    holds one URL a line and gives empty captions. `limit` is the largest number of rows, 0 is all.

    Raises `UrlListError` for a missing file, an unknown format, a missing column or an empty list.
    """
    fs, files = _files(str(path))
    batches: list[pa.Table] = []
    count = 0
    for name in files:
        for batch in _read_file(fs, name, url_col, caption_col):
            batches.append(batch.slice(0, limit - count) if limit else batch)
            count += len(batches[-1])
            if limit and count >= limit:
                return pa.concat_tables(batches)
    if not count:
        raise UrlListError(f"{path}: expected at least one row, got an empty list. Check that the crawl wrote it.")
    return pa.concat_tables(batches)


def split(table: pa.Table, samples_per_shard: int) -> list[Part]:
    """Cut a list into parts of `samples_per_shard` rows; the last one may be shorter. Copies nothing.

    Raises `UrlListError` for more parts than shards can be numbered.
    """
    starts = range(0, len(table), samples_per_shard)
    if len(starts) > 10**SHARD_DIGITS:
        raise UrlListError(
            f"expected at most {10**SHARD_DIGITS} shards, got {len(starts)} for {len(table)} URLs. "
            f"Set ingest.samples_per_shard to {-(-len(table) // 10**SHARD_DIGITS)} or more."
        )
    return [Part(number, table.slice(start, samples_per_shard)) for number, start in enumerate(starts)]


def _files(path: str) -> tuple[Any, list[str]]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fsspec.core.has_magic(root):
            found = fs.glob(root)
        elif root.endswith(_NAMES) and not fs.isdir(root):
            found = [root] if fs.exists(root) else []
        else:
            found = fs.ls(root, detail=False) if fs.isdir(root) else [root] if fs.exists(root) else []
    except (ValueError, ImportError, OSError) as error:
        raise UrlListError(f"{path}: this URL list cannot be opened ({error}). Check the path.") from error
    if not found:
        raise UrlListError(f"{path}: no such URL list. Check data.urls; a file, a folder or a glob is expected.")
    files = sorted(name for name in map(str, found) if name.endswith(_NAMES))
    if not files:
        raise UrlListError(
            f"{path}: expected {', '.join(FORMATS)} (all but parquet also .gz), got {_some(found)}. Convert the list."
        )
    return fs, files


def _read_file(fs: Any, name: str, url_col: str, caption_col: str) -> Iterator[pa.Table]:
    kind = next(part for part in reversed(name.split(".")) if part in FORMATS)
    reader = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _jsonl, "txt": _txt}[kind]
    wanted = [url_col] if kind == "txt" else [url_col, caption_col]
    try:
        with fs.open(name, "rb", compression="gzip" if name.endswith(".gz") else None) as file:
            for columns in reader(file, name, wanted):
                yield pa.Table.from_arrays([_text(column) for column in columns], schema=SCHEMA)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise UrlListError(f"{name}: this {kind} file cannot be read ({error}). Write it again.") from error


def _text(column: Any) -> Any:
    return pc.fill_null(column.cast(pa.string()), "")


def _need(name: str, wanted: list[str], found: list[str]) -> None:
    missing = [column for column in wanted if column not in found]
    if missing:
        raise UrlListError(
            f"{name}: expected the columns {', '.join(wanted)}, got {', '.join(found) or 'none'}; "
            f"{', '.join(missing)} missing. Set data.url_col and data.caption_col."
        )


def _parquet(file: IO[bytes], name: str, wanted: list[str]) -> Iterator[list]:
    parquet = pq.ParquetFile(file)
    _need(name, wanted, parquet.schema_arrow.names)
    for batch in parquet.iter_batches(columns=list(dict.fromkeys(wanted))):
        yield [batch.column(column) for column in wanted]


def _csv(file: IO[bytes], name: str, wanted: list[str]) -> Iterator[list]:
    tabs = name.removesuffix(".gz").endswith(".tsv")
    parse = csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=not tabs)
    header = file.readline()
    if not header.strip():
        return
    found = csv.read_csv(io.BytesIO(header), parse_options=parse).column_names
    _need(name, wanted, found)
    if not file.read(1):
        return
    file.seek(len(header))
    read = csv.ReadOptions(column_names=found)
    convert = csv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()))
    for batch in csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
        yield [batch.column(column) for column in wanted]


def _jsonl(file: IO[bytes], name: str, wanted: list[str]) -> Iterator[list]:
    first = file.readline()
    if not first.strip():
        return
    try:
        found = json.loads(first)
    except ValueError as error:
        raise UrlListError(f"{name}: expected one JSON object a line, got {first[:60]!r} ({error}).") from error
    file.seek(0)
    options = arrow_json.ParseOptions(
        explicit_schema=pa.schema([(column, pa.string()) for column in wanted]),
        unexpected_field_behavior="ignore",
    )
    table = arrow_json.read_json(file, parse_options=options)
    absent = [column for column in wanted if table.column(column).null_count == len(table)]
    _need(name, wanted, [column for column in {**dict.fromkeys(wanted), **found} if column not in absent])
    yield [table.column(column).combine_chunks() for column in wanted]


def _txt(file: IO[bytes], name: str, wanted: list[str]) -> Iterator[list]:
    while lines := file.readlines(1 << 24):
        urls = [text for line in lines if (text := line.decode().strip())]
        yield [pa.array(urls, pa.string()), pa.array([""] * len(urls), pa.string())]


def _some(names: list[str]) -> str:
    return ", ".join(sorted(str(name).rsplit("/", 1)[-1] for name in names)[:5])
