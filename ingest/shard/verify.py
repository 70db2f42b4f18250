"""Reads a shard back as training would, and indexes the samples that training can use.

The tar's members are found as in any tar (`roclip.data.tar_index`), and the images are decoded as `roclip.data.reader` does it:
a complete JPEG by OpenCV, everything else by Pillow. JPEGs are decoded at an eighth of their size and in grey, which still
reads all their bytes through training's decoder. webdataset would import torch here. The parquet is trusted only for rows that
failed.
"""

import io
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from roclip.data.outcomes import REASONS, reason_of
from roclip.data.tar_index import Member, TarScan

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
MAX_PIXELS = 89_478_485
"""Training refuses larger images before decoding them."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that training reads."""
_COLUMNS = ("key", "caption", "status", "error_message")
_BAD = [name for name, reason in REASONS.items() if reason.bad]


@dataclass(frozen=True)
class ShardReport:
    """The outcome of the rows of one shard: `urls == samples + sum(failed.values())`."""

    index: pa.Table
    """`INDEX_SCHEMA`, one row per usable sample, by key: where image and caption are in the tar, in bytes."""
    urls: int
    failed: dict[str, int] = field(default_factory=dict)
    """Rows that gave no usable sample, by reason."""
    flags: dict[str, int] = field(default_factory=dict)
    """Usable samples by flag (`ingest.shard.images.FLAGS`, `ingest.shard.rows`, `ingest.shard.sample_sink`)."""

    @property
    def samples(self) -> int:
        """Number of usable samples."""
        return len(self.index)

    @property
    def bad_frac(self) -> float:
        """Fraction of unusable rows among all rows that arrived."""
        bad = sum(self.failed.get(reason, 0) for reason in _BAD)
        return bad / max(1, bad + self.samples)


def verify(tar: Path, parquet: Path, *, urls: int | None = None) -> ShardReport:
    """Read every sample of a shard, decode its image, and count the rows without a usable sample by reason.

    `urls` is the number of rows that the shard stands for, by default the rows of the parquet. Damaged files are not an error:
    of a truncated tar the samples before the cut are used, and the others count as `truncated_tar`; rows that are in neither
    file count as `no_record`.
    """
    rows = _rows(parquet)
    samples = _group(tar)
    failed: Counter[str] = Counter()
    flags: Counter[str] = Counter()
    usable: list[tuple] = []
    with tar.open("rb") as file:
        for key in sorted(rows.keys() | samples.keys()):
            members, row = samples.get(key, {}), rows.get(key, _Row())
            reason = row.reason or _sample_problem(file, members)
            if reason:
                failed[reason] += 1
                continue
            flags.update(row.flags)
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
    return ShardReport(index, urls, dict(sorted(failed.items())), dict(sorted(flags.items())))


class _Row(NamedTuple):
    """A row of the parquet."""

    reason: str = ""
    """Why the row failed, or ""."""
    flags: tuple[str, ...] = ()


def _rows(parquet: Path) -> dict[str, _Row]:
    try:
        names = [*_COLUMNS, *(name for name in pq.read_schema(parquet).names if name == "flags")]
        table = pq.read_table(parquet, columns=names)
    except (pa.ArrowException, OSError):
        return {}
    return {row["key"]: _Row(_failure_reason(row), tuple(row.get("flags") or ())) for row in table.to_pylist()}


def _failure_reason(row: dict) -> str:
    if not (row["caption"] or "").strip():  # first, so that this count does not depend on whether the fetch failed
        return "empty_caption"
    return "" if row["status"] == "success" else reason_of(row["error_message"] or "")


def _group(tar: Path) -> dict[str, dict[str, Member]]:
    """Key -> suffix -> member, for all members that are completely in the file."""
    groups: dict[str, dict[str, Member]] = {}
    with tar.open("rb", buffering=0) as file:
        for member in TarScan(file.read):
            key, dot, suffix = member.name.partition(".")
            groups.setdefault(key, {})[dot + suffix] = member
    return groups


def _image(members: dict[str, Member]) -> Member:
    return next(member for suffix, member in members.items() if suffix in IMAGES)


def _sample_problem(file: io.BufferedReader, members: dict[str, Member]) -> str:
    """Why training cannot use this sample, or ""."""
    if ".txt" not in members or not any(suffix in IMAGES for suffix in members):
        return "truncated_tar"
    if not _read(file, members[".txt"]).decode(errors="replace").strip():
        return "empty_caption"
    return _decoding_problem(_read(file, _image(members)))


def _decoding_problem(encoded: bytes) -> str:
    """Why training cannot decode this image, or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    return "too_many_pixels"
                whole = image.format == "JPEG" and image.mode in ("RGB", "L") and encoded.endswith(b"\xff\xd9")
                if not whole:
                    image.load()
    except Image.DecompressionBombError:
        return "too_many_pixels"
    except Exception:  # Pillow's plugins can raise anything on damaged bytes
        return "undecodable"
    return "undecodable" if whole and not _opencv_reads(encoded) else ""


def _opencv_reads(jpeg: bytes) -> bool:
    import cv2  # only after `fetch` has set OpenCV's pixel limit, which is read at import

    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8) is not None


def _read(file: io.BufferedReader, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
