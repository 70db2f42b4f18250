"""Uses ready-made tars, such as a LAION or DataComp download, as shards: found by pattern and indexed once.

The tars stay in place. A separate folder gets an index and a manifest record for each tar, and from then on is a folder of
shards like any other.
"""

import contextlib
import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from roclip.data.cache import ShardUnreadableError, read_patiently
from roclip.data.shards import Manifest, ShardRecord, index_path
from roclip.data.tar_index import IMAGE_SUFFIXES, Member, TarSample, TarScan, group
from roclip.errors import DataError
from roclip.metrics.registry import Progress
from roclip.storage import names_in, place, write_atomic

MAX_TARS = 10_000_000
MAX_PARQUET_BYTES = 1 << 28
"""A larger parquet beside a tar is ignored; img2dataset's has a few MB."""
MAX_PARQUET_ROWS = 1 << 20
_READ_AHEAD = 1 << 24
"""Bytes per request to a store."""
_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
T = TypeVar("T")


def is_pattern(where: str) -> bool:
    """Whether `data.shards` names ready-made tars rather than a folder that ingest fills.

    True for `::`, braces, globs, a name that ends in `.tar`, and a folder with tars but no manifest.
    """
    if any(mark in where for mark in ("::", "{", "*", "?")) or where.endswith(".tar") or where.startswith("pipe:"):
        return True
    names = names_in(place(where).expanduser()) if where else []
    return "manifest" not in names and any(name.endswith(".tar") for name in names)


def shards_root(where: str, run: Path) -> Path:
    """Return the folder of a run's manifest and indexes.

    That is `where` (its `data.shards`), or `shards/` of the run if `where` is empty or names ready-made tars.
    """
    return run / "shards" if not where or is_pattern(where) else place(where)


def estimated_samples(patterns: str) -> int:
    """Estimate the samples of all tars from the number in the first. Raises `DataError` as `expand` does, or if it is no tar."""
    tars = expand(patterns)
    with _reading(tars[0][1]) as (read, _):
        return len(tars) * sum(1 for _ in group(TarScan(read)))


def expand(patterns: str) -> list[tuple[str, str]]:
    """Return (source, tar) for each tar, as absolute paths or URLs: sources in order, tars sorted by name within each.

    Args:
        patterns: Sources with `::` between them. A source is a tar, a folder of tars, or a pattern with braces
            (`{00000..00331}`, `{a,b}`) or globs (`*`, `?`), local or on any store that fsspec supports.

    Raises `DataError` for a source that has no tar, cannot be read by fsspec or has too many tars, and for a tar that is
    named twice.
    """
    listed = [(source, tar) for source in patterns.split("::") for tar in _tars(source)]
    tar, times = Counter(tar for _, tar in listed).most_common(1)[0]
    if times > 1:
        raise DataError(f"{patterns}: expected each tar once, got {tar} {times} times. Name it in one source only.")
    return listed


def index_tars(
    patterns: str, folder: str | Path, *, on_progress: Progress | None = None, workers: int | None = None
) -> Manifest:
    """Index all tars that the patterns name (`expand`) and return their manifest; tars already indexed are not read.

    Each tar is read once from end to end, several in parallel. Its index includes the columns of the img2dataset parquet beside
    it. The contents of a tar are never fatal: unusable samples are counted in the record by reason (`no_image`, `no_caption`,
    `duplicate_key`), and a truncated or broken tar counts once (`truncated_tar`, `broken_tar`).

    Args:
        folder: Folder for the indexes and the manifest, local or on a store.
        workers: Number of tars read in parallel; None means Python's default for threads.

    Raises `DataError` for patterns without tars, a tar that cannot be opened or read, a folder that holds other shards, and
    if no sample was found.
    """
    listed = {tar: source for source, tar in expand(patterns)}
    manifest = Manifest(folder)
    records = {record.tar: record for record in manifest.records()}
    for tar, record in records.items():
        if listed.get(tar) != record.source:
            raise DataError(
                f"{manifest.root}: expected the tars of {patterns}, got {record.tar or record.name} of "
                f"{record.source or 'an ingest'}. Use another folder for other tars."
            )
    todo = {tar: source for tar, source in listed.items() if tar not in records}
    if todo or manifest.summary is None:
        manifest.reopen()
        started_s, read_bytes = time.monotonic(), 0
        for record in _index_all(todo, manifest, workers):
            records[record.tar] = record
            manifest.pack()
            read_bytes += record.bytes
            if on_progress:
                on_progress(
                    len(records), len(listed), _progress_text(records, listed, read_bytes, started_s, len(todo))
                )
        manifest.finish(_summary(records, listed))
    _require_samples(patterns, records)
    return manifest


def _tars(source: str) -> list[str]:
    """Return the tars of one source, sorted."""
    if source.startswith("pipe:"):
        raise DataError(
            f"{source}: expected paths or URLs of tars, got a shell command. Name the tars themselves, such as "
            "s3://bucket/{00000..00331}.tar: any store that fsspec knows is read."
        )
    if not source:
        raise DataError("data.shards: expected a source on each side of `::`, got an empty one. Take the `::` out.")
    try:
        fs, path = fsspec.url_to_fs(source)
    except (ValueError, ImportError) as error:
        raise DataError(
            f"{source}: expected a path or a URL that fsspec can read ({error}). Install the store's package or copy "
            "the tars."
        ) from error
    fs.invalidate_cache()  # fsspec caches listings, and a download may be in progress
    found = [tar for name in _without_braces(source, path) for tar in _named(source, fs, name)]
    if not found:
        raise DataError(f"{source}: expected at least one tar, got none. Check the pattern.")
    return sorted(found if isinstance(fs, LocalFileSystem) else map(fs.unstrip_protocol, found))


def _without_braces(source: str, path: str) -> list[str]:
    try:
        bound, rest = 1, path
        while braces := _INNERMOST_BRACES.search(rest):
            bound *= _choices(braces[1])
            rest = rest[: braces.start()] + rest[braces.end() :]
        names = list(itertools.islice(braceexpand(path), MAX_TARS + 1)) if bound <= MAX_TARS else []
    except ValueError as error:
        raise DataError(f"{source}: expected balanced braces ({error}). Check the pattern.") from error
    if not names or len(names) > MAX_TARS:
        raise DataError(f"{source}: expected at most {MAX_TARS:,} tars, got more. Check the braces.")
    return names


def _choices(braced: str) -> int:
    if numbers := _NUMBERS.fullmatch(braced):
        return abs(int(numbers[2]) - int(numbers[1])) // (int(numbers[3] or 1) or 1) + 1
    return 52 if ".." in braced else braced.count(",") + 1  # letters


def _named(source: str, fs: Any, name: str) -> list[str]:
    """Return the tars that a name without braces stands for."""
    if "*" in name or "?" in name:
        found = _list(source, lambda: fs.glob(name))
    elif name.endswith(".tar"):
        found = [name]
    else:
        names = [path.rstrip("/") for path in _list(source, lambda: fs.ls(name, detail=False))]
        if any(path.endswith("/manifest") for path in names):
            raise DataError(
                f"{source}: expected a folder of tars, got one that was ingested. Set data.shards to it alone."
            )
        found = [path for path in names if path.endswith(".tar")]
    if isinstance(fs, LocalFileSystem) and (missing := [tar for tar in found if not Path(tar).is_file()]):
        raise DataError(f"{source}: expected {missing[0]} to be a tar, got no file there. Check the pattern.")
    return found


def _list(source: str, listing: Callable[[], T]) -> T:
    try:
        return read_patiently(listing)
    except ShardUnreadableError as error:
        raise DataError(
            f"{source}: expected tars, but they cannot be listed ({error.__cause__ or error}). Check the pattern."
        ) from error


def _index_all(todo: dict[str, str], manifest: Manifest, workers: int | None) -> Iterator[ShardRecord]:
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(_index, tar, source, manifest) for tar, source in todo.items()]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _index(tar: str, source: str, manifest: Manifest) -> ShardRecord:
    """Index a tar and publish its record."""
    samples: dict[str, TarSample] = {}
    failed: Counter[str] = Counter()
    with _reading(tar) as (read, size):
        scan = TarScan(read)
        for sample in group(scan):
            reason = _unusable(sample, samples)
            if not reason:
                samples[sample.key] = sample
            elif not scan.problem:  # otherwise it is the last one, truncated, and counted below
                failed[reason] += 1
        if size is not None and scan.size != size:
            raise DataError(f"{tar}: expected {size} bytes, got {scan.size}. Run this again.")
    if scan.problem:
        failed[scan.problem] += 1
    buffer = pa.BufferOutputStream()
    pq.write_table(_with_metadata(_table(tar, samples), tar), buffer)
    content = buffer.getvalue().to_pybytes()
    record = ShardRecord(
        name=f"{PurePosixPath(tar).stem}-{hashlib.blake2b(tar.encode(), digest_size=4).hexdigest()}.tar",
        samples=len(samples),
        bytes=scan.size,
        sha256=scan.sha256,
        index_sha256=hashlib.sha256(content).hexdigest(),
        urls=len(samples) + failed.total(),
        failed=dict(sorted(failed.items())),
        tar=tar,
        source=source,
    )
    write_atomic(index_path(manifest.root, record.name), content)
    manifest.publish(record)
    return record


@contextlib.contextmanager
def _reading(tar: str) -> Iterator[tuple[Callable[[int], bytes], int | None]]:
    """Open a tar; yield its read function, and its size if the store knows it. Raises `DataError` that names the tar."""
    where = place(tar)
    try:
        if isinstance(where, Path):
            with where.open("rb", buffering=0) as file:
                yield file.read, None
        else:
            store: Any = where
            with read_patiently(lambda: store.fs.open(store.path, "rb", block_size=_READ_AHEAD)) as file:
                yield lambda count: read_patiently(lambda: file.read(count)), getattr(file, "size", None)
    except (OSError, ShardUnreadableError) as error:
        raise DataError(
            f"{tar}: expected a tar that can be read ({error.__cause__ or error}). Bring it back, or take it out of "
            "data.shards."
        ) from error


def _unusable(sample: TarSample, before: dict[str, TarSample]) -> str:
    if sample.key in before:
        return "duplicate_key"
    if sample.image is None:
        return "no_image"
    return "" if sample.caption or sample.json else "no_caption"


def _table(tar: str, samples: dict[str, TarSample]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "key": pa.array(samples, pa.string()),
        "id": pa.array([_id(tar, key) for key in samples], pa.int64()),
    }
    for kind in ("image", "caption", "json"):
        members = [getattr(sample, kind) or Member("", 0, 0) for sample in samples.values()]
        columns[f"{kind}_offset"] = pa.array([member.offset for member in members], pa.int64())
        columns[f"{kind}_size"] = pa.array([member.size for member in members], pa.int64())
    return pa.table(columns)


def _id(tar: str, key: str) -> int:
    """Return a 63-bit hash of tar and key, which serves as the sample's id."""
    return int.from_bytes(hashlib.blake2b(f"{tar}\n{key}".encode(), digest_size=8).digest(), "big") >> 1


def _with_metadata(index: pa.Table, tar: str) -> pa.Table:
    """Join the columns of the parquet beside the tar to the index by key; return the index unchanged without one."""
    beside = place(f"{tar.removesuffix('.tar')}.parquet")
    try:
        content = read_patiently(lambda: _read_bounded(beside))
        if len(content) > MAX_PARQUET_BYTES or pq.read_metadata(pa.BufferReader(content)).num_rows > MAX_PARQUET_ROWS:
            return index
        metadata = pq.read_table(pa.BufferReader(content))
        rows: dict[str, int] = {}
        for row, key in enumerate(metadata["key"].cast(pa.string()).to_pylist()):
            rows.setdefault(key, row)
        order = pa.array([rows.get(key) for key in index["key"].to_pylist()], pa.int64())
        names = [name for name, times in Counter(metadata.column_names).items() if times == 1]
        for name in names:
            if name not in index.column_names:
                index = index.append_column(name, metadata[name].take(order))
    except (pa.ArrowException, OSError, ValueError, KeyError, ShardUnreadableError):
        return index
    return index


def _read_bounded(path: Path) -> bytes:
    """Read at most `MAX_PARQUET_BYTES` + 1 bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_PARQUET_BYTES + 1)
    except PermissionError as error:  # how a bucket without list permission reports a missing file
        raise FileNotFoundError(path) from error


def _progress_text(
    records: dict[str, ShardRecord], listed: dict[str, str], read_bytes: int, started_s: float, todo: int
) -> str:
    elapsed_s = max(time.monotonic() - started_s, 1e-9)
    left = len(listed) - len(records)
    samples = sum(record.samples for record in records.values())
    eta = f"  {elapsed_s / (todo - left) * left:.0f} s left" if left else ""
    return f"{len(records):,}/{len(listed):,} tars  {samples:,} samples  {read_bytes / 1e6 / elapsed_s:.0f} MB/s{eta}"


def _summary(records: dict[str, ShardRecord], listed: dict[str, str]) -> dict:
    failed: Counter[str] = Counter()
    sources = dict.fromkeys(listed.values(), 0)
    for record in records.values():
        failed.update(record.failed)
        sources[record.source] += record.samples
    return {
        "urls": sum(record.urls for record in records.values()),
        "succeeded": sum(sources.values()),
        "failed": dict(failed.most_common()),
        "shards": len(records),
        "sources": sources,
    }


def _require_samples(patterns: str, records: dict[str, ShardRecord]) -> None:
    if any(record.samples for record in records.values()):
        return
    failed = sum((Counter(record.failed) for record in records.values()), Counter())
    reasons = ", ".join(f"{reason} {count}" for reason, count in failed.most_common()) or "they are empty"
    raise DataError(
        f"{patterns}: expected samples of an image ({', '.join(IMAGE_SUFFIXES)}) with a txt or json, got none in "
        f"{len(records)} tars ({reasons}). Check the suffixes."
    )
