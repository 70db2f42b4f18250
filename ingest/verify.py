"""Reads a shard back as training would, and writes down what can be learned from.

The tar's members are found as those of any tar (`roclip.tar_index`), and the images are read with Pillow, as
`roclip.stream` does; webdataset would import torch here. What img2dataset says about a row is believed only where it
says that the row failed.
"""

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ingest.policy import MAX_PIXELS
from ingest.reasons import REASONS, reason_of
from roclip.tar_index import Member, TarScan

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("caption_offset", pa.int64()),
        ("caption_size", pa.int64()),
    ]
)
IMAGES = (".jpg", ".png", ".webp")
_BAD = [name for name, reason in REASONS.items() if reason.bad]


@dataclass(frozen=True)
class ShardReport:
    """What became of the rows of one shard: `urls == samples + sum(failed.values())`."""

    index: pa.Table
    """`INDEX_SCHEMA`, one row per usable sample, by key: where image and caption lie in the tar, in bytes."""
    urls: int
    failed: dict[str, int] = field(default_factory=dict)
    """Rows that gave no usable sample, by reason."""

    @property
    def samples(self) -> int:
        """Usable samples."""
        return len(self.index)

    @property
    def bad_frac(self) -> float:
        """Share of the rows that arrived and are no use, of all that arrived."""
        bad = sum(self.failed.get(reason, 0) for reason in _BAD)
        return bad / max(1, bad + self.samples)


def verify(tar: Path, parquet: Path, *, urls: int | None = None) -> ShardReport:
    """Read every sample of a shard, decode its image, and count the rows that gave none by reason.

    `urls` is the number of rows that the shard stands for; without it, the rows of the parquet. Nothing in
    the files is fatal: of a tar that was cut short the samples before the cut are used, and the others count
    as `truncated_tar`; rows that neither file knows count as `no_record`.
    """
    rows = _rows(parquet)
    samples = _group(tar)
    failed: Counter[str] = Counter()
    usable: list[tuple] = []
    with tar.open("rb") as file:
        for key in sorted(rows.keys() | samples.keys()):
            members = samples.get(key, {})
            reason = rows.get(key) or _unusable(file, members)
            if reason:
                failed[reason] += 1
                continue
            image, caption = _image(members), members[".txt"]
            usable.append((key, image.offset, image.size, caption.offset, caption.size))
    if urls is None:
        urls = len(rows)
    missing = urls - len(usable) - failed.total()
    if missing > 0:
        failed["no_record"] += missing
    columns = list(zip(*usable, strict=True)) or [[] for _ in INDEX_SCHEMA]
    index = pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)], schema=INDEX_SCHEMA
    )
    return ShardReport(index, urls, dict(sorted(failed.items())))


def _rows(parquet: Path) -> dict[str, str]:
    """Key -> why img2dataset (or an empty caption) rules the row out, or "" if nothing does."""
    try:
        table = pq.read_table(parquet, columns=["key", "caption", "status", "error_message"])
    except (pa.ArrowException, OSError):
        return {}
    return {row["key"]: _ruled_out(**row) for row in table.to_pylist()}


def _ruled_out(key: str, caption: str | None, status: str, error_message: str | None) -> str:
    if not (caption or "").strip():  # first, so that this count does not depend on the weather
        return "empty_caption"
    return "" if status == "success" else reason_of(error_message or "")


def _group(tar: Path) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> member, of all members that lie in the file as a whole."""
    groups: dict[str, dict[str, Member]] = {}
    with tar.open("rb", buffering=0) as file:
        for member in TarScan(file.read):
            key, dot, suffix = member.name.partition(".")
            groups.setdefault(key, {})[dot + suffix] = member
    return groups


def _image(members: dict[str, Member]) -> Member:
    return next(member for suffix, member in members.items() if suffix in IMAGES)


def _unusable(file: io.BufferedReader, members: dict[str, Member]) -> str:
    """Why training cannot use this sample, or "" if it can."""
    if ".txt" not in members or not any(suffix in IMAGES for suffix in members):
        return "truncated_tar"
    if not _read(file, members[".txt"]).decode(errors="replace").strip():
        return "empty_caption"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the line below is stricter
            with Image.open(io.BytesIO(_read(file, _image(members)))) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "too_many_pixels"
                image.load()
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except Exception:  # Pillow's plugins raise whatever they like on damaged bytes
        return "undecodable"
    return ""


def _read(file: io.BufferedReader, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
