"""The shard format and the manifest: all that ingest and training share.

    shards/
      00000.tar             WebDataset: <key>.jpg <key>.txt <key>.json, as img2dataset writes it
      00000.parquet         one row per URL with its status, as img2dataset writes it
      00000.index.parquet   one row per usable sample: key, and where its image and caption lie in the tar
      manifest/00000.json   the shard exists: counts, sizes, sha256. Written last, atomically, once
      manifest/END.json     no more shards will come

A record is one small file that is put whole under a name of its own, so that publishing a shard twice is the
same as publishing it once, and a store without rename or append can hold a manifest.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from roclip.errors import ShardError

END = "END.json"
SHARD_DIGITS = 5


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
    """Of the tar."""
    index_sha256: str
    """Of the index parquet."""
    urls: int
    """Rows of the URL list that this shard stands for."""
    failed: dict[str, int] = field(default_factory=dict)
    """Rows that gave no usable sample, by reason."""


class Manifest:
    """The sealed shards of a folder. Safe to read while another process publishes."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.folder = self.root / "manifest"

    def records(self) -> tuple[ShardRecord, ...]:
        """All sealed shards, in the order of their names."""
        return tuple(self._read(path) for path in sorted(self.folder.glob("*.json")) if path.name != END)

    def publish(self, record: ShardRecord) -> None:
        """Make a shard exist. The tar and its index must lie at their final names already."""
        write_atomic(self.folder / f"{Path(record.name).stem}.json", json.dumps(asdict(record), indent=1))

    def finish(self, summary: dict) -> None:
        """Say that no more shards will come; `summary` is what ingest wants to be remembered."""
        write_atomic(self.folder / END, json.dumps(summary, indent=1))

    @property
    def summary(self) -> dict | None:
        """What `finish` was told, or None while ingest still runs."""
        path = self.folder / END
        return json.loads(path.read_text()) if path.exists() else None

    def reopen(self) -> None:
        """Take the end mark back: more shards will come."""
        (self.folder / END).unlink(missing_ok=True)

    def _read(self, path: Path) -> ShardRecord:
        try:
            return ShardRecord(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ShardError(
                f"{path}: not a shard record ({error}). Delete this file and run ingest again: the shard is redone."
            ) from error


def index_path(root: Path, record_name: str) -> Path:
    """Where the index of a shard lies."""
    return root / f"{Path(record_name).stem}.index.parquet"


def sample_key(row: int, samples_per_shard: int) -> str:
    """The key that img2dataset gives to a row of the URL list: five digits of shard, then of the row within it."""
    shard, position = divmod(row, samples_per_shard)
    width = math.ceil(math.log10(samples_per_shard))
    return f"{shard * 10**width + position:0{width + SHARD_DIGITS}d}"


def digest(records: Iterable[ShardRecord]) -> str:
    """Names a set of shards: sha256 over their names and contents, 16 hex digits."""
    lines = "".join(f"{record.name} {record.sha256}\n" for record in sorted(records, key=lambda r: r.name))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file such that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
