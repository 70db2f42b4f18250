"""The shard format and the manifest: all that ingest and training share.

    shards/
      00000.tar             WebDataset: <key>.jpg <key>.txt <key>.json, as img2dataset writes it
      00000.parquet         one row per URL with its status, as img2dataset writes it
      00000.index.parquet   one row per usable sample: key, and where its image and caption are in the tar
      manifest/00000.json   the shard exists: counts, sizes, sha256. Written last, atomically, once
      manifest/END.json     no more shards will come
      manifest/held/        records of sealed shards that may not be trained on before ingest has ended
      ledger.json, lease/   which shard number stands for which rows; who fills this folder (`ingest/folder`)

Tars that were made elsewhere stay where they are (`roclip/data/tar_sources.py`): only their indexes and records are here.

A record is one small file that is written atomically under a name of its own, so publishing a shard twice equals publishing it
once, and a store without rename or append can hold a manifest.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from roclip.errors import ShardError
from roclip.storage import content_of, drop, names_in, place, write_atomic

END = "END.json"
HELD = "manifest/held"
PACK = 1000
"""Number of loose records from which they are packed."""
SHARD_DIGITS = 5
_AT_A_TIME = 16
"""Files of a store that are read or deleted concurrently."""
_LISTINGS = 5
"""How often a folder is listed until every record in it can be read."""
T = TypeVar("T")


@dataclass(frozen=True)
class ShardRecord:
    """One sealed shard."""

    name: str
    """File name of the tar, such as `00003.tar`."""
    samples: int
    """Usable samples: those in the index."""
    bytes: int
    """Size of the tar."""
    sha256: str
    """sha256 of the tar."""
    index_sha256: str
    """sha256 of the index parquet."""
    urls: int
    """Rows of the URL list that this shard stands for."""
    failed: dict[str, int] = field(default_factory=dict)
    """Rows without a usable sample, by reason."""
    tar: str = ""
    """Where the tar is, if not beside its index: an absolute path or a URL."""
    source: str = ""
    """The pattern that matched this tar, if it is elsewhere."""
    rows_sha256: str = ""
    """Hash of the shard's rows in the list; empty if not recorded."""
    retried: dict[str, int] = field(default_factory=dict)
    """For a shard of a retry pass: its rows by the reason under which an earlier shard counts them as failed. A row's last
    outcome counts, so subtract these from the sums of `urls` and of `failed` over shards.
    """


class Manifest:
    """The sealed shards of a folder. Safe to read while another process publishes and packs.

    Args:
        root: The folder, local or as a URL of a store that fsspec supports.
        folder: Where the records are in it: `HELD` for sealed shards that may not be trained on yet.
    """

    def __init__(self, root: str | Path, folder: str = "manifest"):
        self.root = place(root)
        self.folder = self.root / folder
        self._packs: dict[str, dict[str, ShardRecord]] = {}

    def records(self) -> tuple[ShardRecord, ...]:
        """All sealed shards, sorted by name. Raises `ShardError` for a record that cannot be read."""
        gone = ""
        for _ in range(_LISTINGS):
            try:
                return self._records()
            except FileNotFoundError as error:  # packed after it was listed, so the next listing finds it in the pack
                gone = error.filename or error
        raise ShardError(
            f"{gone}: expected a record or a pack of shards, got a name in {self.folder} without a file behind it, "
            f"{_LISTINGS} times. Delete that name and run ingest again: the shard is redone."
        )

    def get(self, name: str) -> ShardRecord | None:
        """The record of one shard, or None."""
        try:
            return self._read(self.path_of(name))
        except FileNotFoundError:
            return {record.name: record for record in self.records()}.get(name)

    def publish(self, record: ShardRecord) -> None:
        """Make a shard exist. The tar and its index must have their final names already."""
        write_atomic(self.path_of(record.name), json.dumps(asdict(record), indent=1))

    def pack(self, at_least: int = PACK) -> None:
        """Pack the loose records into one file, if there are at least `at_least`. Only one process may do this at a time:
        ingest's driver.

        A kill leaves records both loose and packed, which is equivalent.
        """
        loose = [name for name in self._names() if name.endswith(".json") and name != END]
        if len(loose) < at_least:
            return
        records = self._each(self._read, loose)
        rows = [
            {**asdict(record), "failed": list(record.failed.items()), "retried": list(record.retried.items())}
            for record in records
        ]
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=_PACK_SCHEMA), buffer)
        write_atomic(self.folder / f"pack-{digest(records)}.parquet", buffer.getvalue().to_pybytes())
        self._each(drop, loose)

    def finish(self, summary: dict) -> None:
        """Record that no more shards will come. `summary` is kept for `Manifest.summary`."""
        write_atomic(self.folder / END, json.dumps(summary, indent=1))

    @property
    def summary(self) -> dict | None:
        """The summary passed to `finish`, or None while ingest is running."""
        try:
            return json.loads(content_of(self.folder / END))
        except FileNotFoundError:
            return None

    def reopen(self) -> None:
        """Delete the end mark: more shards will come."""
        drop(self.folder / END)

    def path_of(self, name: str) -> Path:
        """The path of one shard's record while it is not packed."""
        return self.folder / f"{Path(name).stem}.json"

    def _names(self) -> list[str]:
        return sorted(names_in(self.folder))

    def _records(self) -> tuple[ShardRecord, ...]:
        names = self._names()
        known: dict[str, ShardRecord] = {}
        for name in names:
            if name.startswith("pack-"):
                if name not in self._packs:
                    self._packs[name] = self._read_pack(self.folder / name)
                known.update(self._packs[name])
        loose = [name for name in names if name.endswith(".json") and name != END]
        loose = [
            name for name in loose if f"{Path(name).stem}.tar" not in known
        ]  # packed ones may be deleted meanwhile
        known.update((record.name, record) for record in self._each(self._read, loose))
        return tuple(known[name] for name in sorted(known))

    def _each(self, act: Callable[[Path], T], names: Sequence[str]) -> list[T]:
        paths = [self.folder / name for name in names]
        if isinstance(self.folder, Path):
            return [act(path) for path in paths]
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            return list(pool.map(act, paths))

    def _read(self, path: Path) -> ShardRecord:
        content = content_of(path)
        try:
            return ShardRecord(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"{path}: not a shard record ({error}). Delete this file and run ingest again: the shard is redone."
            ) from error

    def _read_pack(self, path: Path) -> dict[str, ShardRecord]:
        content = content_of(path)
        try:
            table = pq.read_table(pa.BufferReader(content), schema=_PACK_SCHEMA)
        except (OSError, ValueError) as error:
            raise ShardError(
                f"{path}: not a pack of shard records ({error}). Restore it, or delete it and run ingest again: "
                "its shards are redone."
            ) from error
        columns = [table[name].to_pylist() for name in _PACK_SCHEMA.names]
        rows = zip(*columns, strict=True)
        return {
            name: ShardRecord(  # older packs have nulls in `tar` and the columns after it
                name,
                samples,
                size,
                sha256,
                index_sha256,
                urls,
                dict(failed),
                tar or "",
                source or "",
                rows_sha256 or "",
                dict(retried or ()),
            )
            for name, samples, size, sha256, index_sha256, urls, failed, tar, source, rows_sha256, retried in rows
        }


_PACK_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("index_sha256", pa.string()),
        ("urls", pa.int64()),
        ("failed", pa.map_(pa.string(), pa.int64())),
        ("tar", pa.string()),
        ("source", pa.string()),
        ("rows_sha256", pa.string()),
        ("retried", pa.map_(pa.string(), pa.int64())),
    ]
)


def index_path(root: Path, record_name: str) -> Path:
    """The path of a shard's index."""
    return root / f"{Path(record_name).stem}.index.parquet"


def tar_path(root: Path, record: ShardRecord) -> Path:
    """The path of a shard's tar, local or on a store as `root` is."""
    return place(record.tar) if record.tar else root / record.name


def read_index(root: Path, record_name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the index of a shard, or the given columns as far as it has them. Raises `ShardError`.

    Always present: key, image_offset, image_size, caption_offset, caption_size. For a tar that was made elsewhere also id,
    json_offset and json_size, and img2dataset's columns about each sample.
    """
    path = index_path(root, record_name)
    try:
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
        names = file.schema_arrow.names
        return file.read([name for name in columns if name in names] if columns else names)
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: the shard's index cannot be read ({error}). Run ingest again.") from error


def sample_ids(index: pa.Table) -> list[int]:
    """The sample ids that training uses: the column id of the index, or else the keys as numbers."""
    if "id" in index.column_names:
        return index["id"].to_pylist()
    return [int(key) for key in index["key"].to_pylist()]


def sample_key(row: int, samples_per_shard: int) -> str:
    """img2dataset's key of a row of the URL list: five digits of shard, then digits of the row within it."""
    shard, position = divmod(row, samples_per_shard)
    width = math.ceil(math.log10(samples_per_shard))
    return f"{shard * 10**width + position:0{width + SHARD_DIGITS}d}"


def digest(records: Iterable[ShardRecord]) -> str:
    """Identifies a set of shards: sha256 over their names and contents, 16 hex digits."""
    lines = "".join(f"{record.name} {record.sha256}\n" for record in sorted(records, key=lambda r: r.name))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]
