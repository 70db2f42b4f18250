"""Opens URL lists and cuts them into parts: one part becomes one shard. The same list gives the same parts on any cluster.

    files.py     the files of a list, opened and decompressed
    formats.py   one file -> its head, then its rows in batches; `json_rows.py` for jsonl and json
    columns.py   which columns are URLs, captions, extra values and expected hashes
    sources.py   list -> parts

A row is never dropped, not even one without a URL: the row's number is the sample's key (`roclip.data.shards.sample_key`).
Lists are streamed: a batch of the file and one part are in memory.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ingest.lists.columns import Columns, choose_columns
from ingest.lists.files import FORMATS, SEPARATOR, ListFile, find_files
from ingest.lists.formats import Head, read_head, read_rows
from roclip.config import Config
from roclip.data.shards import SHARD_DIGITS
from roclip.errors import UrlListError

PART_BYTES = 2**30
"""Largest part in memory."""
_AT_A_TIME = 16
"""Files whose heads are read concurrently."""
_READ_ROWS = 65_536
_NAME_CHARS = 40


@dataclass(frozen=True)
class Part:
    """The rows that one shard stands for."""

    number: int
    """Number of the shard, from 0."""
    table: pa.Table
    """Columns `url` and `caption`, then extra columns, then `expected_md5`, `expected_sha256` and `expected_phash` if the list
    has them; at most `samples_per_shard` rows.
    """


@dataclass
class _ReadProgress:
    """How far the list has been read, including what was skipped."""

    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class UrlList:
    """An open list, with the facts that are known before it is read. Made by `open_list`."""

    name: str
    """Short, of letters, digits, dot, dash and underscore: for the names of tasks."""
    digest: str
    """sha256 of `identity`."""
    rows: int | None
    """Exact if parquet footers give it; None if the list has to be read to count them."""
    columns: tuple[str, ...]
    """Names of the parts' columns."""
    identity: dict[str, Any]
    """What distinguishes this list from others, as JSON: limit, columns, and each file's name, size and, if known, number of
    rows. The contents are not hashed, as that would mean reading 100 GB. So a file that was replaced by one of the same size is
    not noticed, except for a parquet with another number of rows.
    """
    _files: tuple[tuple[ListFile, Head], ...] = field(repr=False)
    _columns: Columns = field(repr=False)
    _limit: int
    _progress: list[_ReadProgress] = field(default_factory=list, repr=False, compare=False)
    """Holds the progress of the last call of `parts`."""

    @property
    def read_frac(self) -> float:
        """Fraction of the list read by the last call of `parts`: of its rows if their number is known, else of its bytes."""
        progress = self._progress[0] if self._progress else _ReadProgress()
        if self.rows:
            return progress.rows / self.rows
        size = sum(file.size_bytes for file, _ in self._files)
        return min(
            1.0, max(progress.bytes / size if size else 0.0, progress.rows / self._limit if self._limit else 0.0)
        )

    def parts(self, samples_per_shard: int, start_row: int = 0) -> Iterator[Part]:
        """Cut the list from `start_row` on into parts of `samples_per_shard` rows; the last one may be shorter.

        The first part's number is the first that no earlier row can have: `start_row / samples_per_shard`, rounded up. Rows
        before `start_row` are skipped by the footers of parquets, and read through in other formats. Each part is a copy, so
        pickling it does not take the rest of the batch along.

        Raises `UrlListError` for a list that cannot be read, has no rows or fewer than `start_row`, for more parts than shard
        numbers, and for a part of more than `PART_BYTES`.
        """
        number = -(-start_row // samples_per_shard)
        if self.rows is not None:
            _check_shards(number - (start_row - self.rows) // samples_per_shard, self.rows)
        return self._parts(samples_per_shard, start_row, number)

    def _parts(self, samples_per_shard: int, start_row: int, number: int) -> Iterator[Part]:
        pieces: list[pa.RecordBatch] = []
        rows = size = 0
        for batch in self._batches(start_row):
            while len(batch):
                piece = batch.slice(0, samples_per_shard - rows)
                batch = batch.slice(len(piece))
                pieces.append(piece)
                rows, size = rows + len(piece), size + piece.nbytes
                if size > PART_BYTES:
                    raise UrlListError(
                        f"{self.name}: expected parts of at most {PART_BYTES} bytes, got more in {rows} rows of part {number}. "
                        "Set a lower ingest.samples_per_shard, or take overlong captions out of the list."
                    )
                if rows == samples_per_shard:
                    yield self._part(number, pieces, samples_per_shard)
                    number, rows, size = number + 1, 0, 0
                    pieces = []
        if pieces:
            yield self._part(number, pieces, samples_per_shard)

    def _part(self, number: int, pieces: list[pa.RecordBatch], samples_per_shard: int) -> Part:
        _check_shards(number + 1, (number + 1) * samples_per_shard)
        positions = range(len(self.columns))
        arrays = [
            pa.concat_arrays([piece.column(at) for piece in pieces]) for at in positions
        ]  # copies, even of a single piece
        return Part(number, pa.Table.from_arrays(arrays, schema=self._columns.schema))

    def _batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """The rows from `start_row` on, up to the limit, with the parts' columns."""
        progress = _ReadProgress()
        self._progress[:] = [progress]
        for file, batch in self._read(progress, start_row):
            if self._limit:
                batch = batch.slice(0, self._limit - progress.rows)
            new = batch.slice(min(max(start_row - progress.rows, 0), len(batch)))
            progress.rows += len(batch)
            if len(new):
                yield self._conform(file, new, progress.rows)
            if self._limit and progress.rows >= self._limit:
                break
        if progress.rows < start_row or not progress.rows:
            raise UrlListError(
                f"{self.name}: expected more than {start_row} rows, got a list of {progress.rows}. Check what wrote it."
            )

    def _conform(self, file: ListFile, batch: pa.RecordBatch, end_row: int) -> pa.RecordBatch:
        try:
            return self._columns.conform(batch)
        except pa.ArrowException as error:
            raise UrlListError(
                f"{file}: expected values that can be converted, got others ({error}) in the {len(batch)} rows before the "
                f"list's row {end_row}. Leave their column out of ingest.columns."
            ) from error

    def _read(self, progress: _ReadProgress, start_row: int) -> Iterator[tuple[ListFile, pa.RecordBatch]]:
        """Rows with the files' columns; whole files and row groups before `start_row` are skipped and counted."""

        def count(size: int) -> None:
            progress.bytes += size

        size = 0
        for file, head in self._files:
            if head.rows is not None and (not head.rows or progress.rows + head.rows <= start_row):
                progress.rows += head.rows
            else:
                groups = head.groups_before(start_row - progress.rows)
                progress.rows += sum(head.groups[:groups])
                for batch in read_rows(file, head, self._columns.sources, count, groups):
                    yield file, batch
            size += file.size_bytes
            progress.bytes = size


def open_list(
    urls: str,
    *,
    url_col: str = "",
    caption_col: str = "caption",
    columns: Sequence[str] = (),
    hashes: bool = True,
    limit: int = 0,
) -> UrlList:
    """Open a URL list: find its files, read their heads and choose its columns.

    Args:
        urls: A file, a folder or a glob on any fsspec store, such as `s3://bucket/urls/*.parquet`; several are separated by
            `::`.
            Formats: parquet, csv, tsv, jsonl, json (an array of objects, or an object of columns), txt (one URL per line,
                without
            captions); all but parquet also as .gz and .zst. For their order see `ingest.lists.files.find_files`.
        url_col: Column of the URLs; "" takes the first one found of url, URL, image_url.
        caption_col: Column of the captions; if missing, the first one found of caption, TEXT, text.
        columns: Extra columns that the parts keep (`ingest.lists.columns.choose_columns`).
        hashes: Whether the parts have the list's columns md5, sha256 and phash, as `expected_md5` and so on.
        limit: Largest number of rows; 0 means all.

    Raises `UrlListError` for a missing or damaged file, an unknown format, a missing or unusable column, and a list without
    rows.
    """
    files = find_files(str(urls))
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        heads = list(pool.map(read_head, files))
    filled = [(file, head.schema) for file, head in zip(files, heads, strict=True) if head.rows != 0]
    if not filled:
        raise UrlListError(f"{urls}: expected at least one row, got an empty list. Check that the crawl wrote it.")
    chosen = choose_columns(filled, url_col=url_col, caption_col=caption_col, carried=columns, hashes=hashes)
    known = [head.rows for head in heads if head.rows is not None]
    rows = sum(known) if len(known) == len(heads) else None
    identity = {
        "limit": limit,
        "columns": [[column.name, column.source] for column in chosen.columns],
        "files": [[file.name, file.size_bytes, head.rows] for file, head in zip(files, heads, strict=True)],
    }
    return UrlList(
        name=_name(str(urls)),
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        rows=min(rows, limit) if rows is not None and limit else rows,
        columns=tuple(chosen.schema.names),
        identity=identity,
        _files=tuple(zip(files, heads, strict=True)),
        _columns=chosen,
        _limit=limit,
    )


def open_configured_list(config: Config, path: str | Path) -> UrlList:
    """Open the URL list at `path` with the columns and the limit of the config, if the config names a list.

    Otherwise it is the one that the embedded origin wrote, with the columns `url` and `caption`, and is read completely.
    """
    if not config.data.urls:
        return open_list(str(path))
    return open_list(
        str(path),
        url_col=config.data.url_col,
        caption_col=config.data.caption_col,
        columns=config.ingest.columns,
        hashes=config.ingest.hash_check != "off",
        limit=config.data.limit,
    )


def read_url_list(path: str, *, url_col: str = "", caption_col: str = "caption", limit: int = 0) -> pa.Table:
    """Read all rows of a URL list into a table of the string columns `url` and `caption`; a missing value is "".

    Arguments and errors are those of `open_list`.
    """
    urls = open_list(path, url_col=url_col, caption_col=caption_col, hashes=False, limit=limit)
    return pa.concat_tables(part.table for part in urls.parts(_READ_ROWS))


def split(table: pa.Table, samples_per_shard: int) -> list[Part]:
    """Cut a table into parts of `samples_per_shard` rows, without copying; the last one may be shorter.

    Raises `UrlListError` for more parts than shard numbers.
    """
    starts = range(0, len(table), samples_per_shard)
    _check_shards(len(starts), len(table))
    return [Part(number, table.slice(start, samples_per_shard)) for number, start in enumerate(starts)]


def _check_shards(shards: int, rows: int) -> None:
    most = 10**SHARD_DIGITS
    if shards > most:
        raise UrlListError(
            f"expected at most {most} shards, got {shards} for {rows} URLs. "
            f"Set ingest.samples_per_shard to {-(-rows // most)} or more."
        )


def _name(urls: str) -> str:
    """A name from the first file, folder or glob; for a glob of files, from their folder."""
    first, *others = urls.split(SEPARATOR)
    fixed = [part for part in first.split("/") if part and not set("*?[") & set(part)]
    base = re.split(rf"\.(?:{'|'.join(FORMATS)})\b", posixpath.basename("/".join(fixed)))[0]
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", base)[:_NAME_CHARS].strip("-.") or "list"
    return f"{short}-and-{len(others)}-more" if others else short
