"""Reads lists of URLs and cuts them into parts: one part becomes one shard. Same list, same parts, whatever the cluster.

    files.py     the files of a list, opened and decompressed
    formats.py        one file -> its head, then its rows in batches; `json_rows.py` for jsonl and json
    columns.py   which columns are URLs, captions, further values, expected hashes
    sources.py        list -> parts

A row is never dropped, not even one without a URL: the row's number is the sample's key (`roclip.data.shards.sample_key`). A list
is streamed: what is in memory is a batch of the file and one part.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from ingest.lists.columns import Columns, choose_columns
from ingest.lists.files import FORMATS, SEPARATOR, ListFile, find_files
from ingest.lists.formats import Head, read_head, read_rows
from roclip.data.shards import SHARD_DIGITS
from roclip.errors import UrlListError

PART_BYTES = 2**30
"""Largest part in memory."""
_AT_A_TIME = 16
"""Files whose heads are read at the same time."""
_READ_ROWS = 65_536
_NAME_CHARS = 40


@dataclass(frozen=True)
class Part:
    """The rows that one shard stands for."""

    number: int
    """Number of the shard, from 0."""
    table: pa.Table
    """Columns `url` and `caption`, then those that are carried and `expected_md5`, `expected_sha256`, `expected_phash` where
    the list has them; at most `samples_per_shard` rows."""


@dataclass
class _Walk:
    """How far a walk over a list has come, what was skipped included."""

    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class UrlList:
    """An open list: what is known of it before it is read. `open_list` makes it."""

    name: str
    """Short, of letters, digits, dot, dash and underscore: for the names of tasks."""
    digest: str
    """sha256 of `identity`."""
    rows: int | None
    """Exact where parquet footers tell; None where only reading does."""
    columns: tuple[str, ...]
    """Of the parts."""
    identity: dict[str, Any]
    """What tells this list from another, as JSON: limit, columns, and of each file its name, its size and, where known, its
    rows. Not what the files hold: to read 100 GB for that is no option. A file that was replaced by one of the same size is
    not noticed, except for a parquet with another number of rows."""
    _files: tuple[tuple[ListFile, Head], ...] = field(repr=False)
    _columns: Columns = field(repr=False)
    _limit: int
    _walks: list[_Walk] = field(default_factory=list, repr=False, compare=False)
    """The last one."""

    @property
    def read_frac(self) -> float:
        """How much of the list the last call of `parts` has read: of its rows where these are known, else of its bytes."""
        done = self._walks[0] if self._walks else _Walk()
        if self.rows:
            return done.rows / self.rows
        size = sum(file.size_bytes for file, _ in self._files)
        return min(1.0, max(done.bytes / size if size else 0.0, done.rows / self._limit if self._limit else 0.0))

    def parts(self, samples_per_shard: int, start_row: int = 0) -> Iterator[Part]:
        """Cut the list from `start_row` on into parts of `samples_per_shard` rows; the last one may be shorter.

        The first part's number is the first that no earlier row can have, `start_row / samples_per_shard` rounded up. What
        lies before `start_row` is skipped by the footers of parquets and read through in other formats. Each part is a copy:
        pickled, it takes nothing else along.

        Raises `UrlListError` for a list that cannot be read, has no rows or fewer than `start_row`, for more parts than
        shards can be numbered, and for a part of more than `PART_BYTES`.
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
        places = range(len(self.columns))
        arrays = [pa.concat_arrays([piece.column(at) for piece in pieces]) for at in places]  # copies, even one piece
        return Part(number, pa.Table.from_arrays(arrays, schema=self._columns.schema))

    def _batches(self, start_row: int) -> Iterator[pa.RecordBatch]:
        """The rows from `start_row` on, up to the limit, as those of parts."""
        done = _Walk()
        self._walks[:] = [done]
        for file, batch in self._read(done, start_row):
            if self._limit:
                batch = batch.slice(0, self._limit - done.rows)
            new = batch.slice(min(max(start_row - done.rows, 0), len(batch)))
            done.rows += len(batch)
            if len(new):
                yield self._conform(file, new, done.rows)
            if self._limit and done.rows >= self._limit:
                break
        if done.rows < start_row or not done.rows:
            raise UrlListError(
                f"{self.name}: expected more than {start_row} rows, got a list of {done.rows}. Check what wrote it."
            )

    def _conform(self, file: ListFile, batch: pa.RecordBatch, end_row: int) -> pa.RecordBatch:
        try:
            return self._columns.conform(batch)
        except pa.ArrowException as error:
            raise UrlListError(
                f"{file}: expected values that can be carried, got others ({error}) in the {len(batch)} rows before the list's "
                f"row {end_row}. Leave their column out of ingest.columns."
            ) from error

    def _read(self, done: _Walk, start_row: int) -> Iterator[tuple[ListFile, pa.RecordBatch]]:
        """Rows as the files have them; those of whole files and row groups before `start_row` are left out and counted."""

        def count(size: int) -> None:
            done.bytes += size

        size = 0
        for file, head in self._files:
            if head.rows is not None and (not head.rows or done.rows + head.rows <= start_row):
                done.rows += head.rows
            else:
                groups = head.groups_before(start_row - done.rows)
                done.rows += sum(head.groups[:groups])
                for batch in read_rows(file, head, self._columns.sources, count, groups):
                    yield file, batch
            size += file.size_bytes
            done.bytes = size


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
        urls: A file, a folder or a glob on any fsspec store, such as `s3://bucket/urls/*.parquet`; several with `::`
            between them. Formats: parquet, csv, tsv, jsonl, json (an array of objects, or an object of columns), txt (a URL
            a line, without captions); all but parquet also as .gz and .zst. Order: `ingest.lists.files.find_files`.
        url_col: Column of the URLs; "" takes the first that is there of url, URL, image_url.
        caption_col: Column of the captions; where it is not there, the first of caption, TEXT, text.
        columns: Further columns that the parts carry (`ingest.lists.columns.choose_columns`).
        hashes: Whether the parts have the list's columns md5, sha256 and phash, as `expected_md5` and so on.
        limit: Largest number of rows; 0 is all.

    Raises `UrlListError` for a missing or damaged file, an unknown format, a column that is missing or of no use, and a list
    without rows.
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


def read_url_list(path: str, *, url_col: str = "", caption_col: str = "caption", limit: int = 0) -> pa.Table:
    """All rows of a URL list in memory, as a table of the string columns `url` and `caption`; a missing value is "".

    Arguments and errors are those of `open_list`.
    """
    urls = open_list(path, url_col=url_col, caption_col=caption_col, hashes=False, limit=limit)
    return pa.concat_tables(part.table for part in urls.parts(_READ_ROWS))


def split(table: pa.Table, samples_per_shard: int) -> list[Part]:
    """Cut a table into parts of `samples_per_shard` rows; the last one may be shorter. Copies nothing.

    Raises `UrlListError` for more parts than shards can be numbered.
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
    """Of the first file, folder or glob; of a glob for files, that of their folder."""
    first, *others = urls.split(SEPARATOR)
    fixed = [part for part in first.split("/") if part and not set("*?[") & set(part)]
    base = re.split(rf"\.(?:{'|'.join(FORMATS)})\b", posixpath.basename("/".join(fixed)))[0]
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", base)[:_NAME_CHARS].strip("-.") or "list"
    return f"{short}-and-{len(others)}-more" if others else short
