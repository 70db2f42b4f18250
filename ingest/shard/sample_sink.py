"""The door through which samples enter a shard.

img2dataset's `Downloader` does two things with each answer, one after the other and in one thread: it has the image resized,
and it has the sample written. `SampleSink` is what it takes for its resizer and for its writer; so it sees the bytes, the picture
and the row, and decides what is stored. Every row that goes in comes out with a fate.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingest.shard import exif
from ingest.shard.images import decode, inspect
from ingest.shard.phash import NEAR_BITS, distance, phash
from ingest.shard.resize import Resize, Resized
from ingest.shard.rows import CAPTION_CLEANED, RowOutcome, Rows
from ingest.shard.tar_writer import SortedTar
from roclip.config import IngestConfig
from roclip.data.outcomes import FetchError
from roclip.data.shards import SHARD_DIGITS
from roclip.errors import ShardError

HASH_MISMATCH = "hash_mismatch"
"""Flag of a sample that is not what the list has seen and was kept, and the reason of one that was not kept."""
MAX_MESSAGE_CHARS = 1000
_FAILED_TO_DOWNLOAD, _FAILED_TO_RESIZE, _SUCCESS = "failed_to_download", "failed_to_resize", "success"


@dataclass
class _Arrived:
    """What is known of the answer that stands in the door, as far as it was looked at."""

    digests: dict[str, str]
    """`sha256`, and what else the list expects."""
    exif: str | None = None
    phash: int | None = None
    flags: tuple[str, ...] = ()
    resized: Resized | None = None


class SampleSink:
    """Resizer and sample writer of one shard.

    Args:
        work: An existing folder, in which `<shard>.tar` and `<shard>.parquet` lie after `close`.
        handled: Is told the size of each body, in bytes, once nothing more is done with it.
    """

    def __init__(self, rows: Rows, work: Path, config: IngestConfig, handled: Callable[[int], None]):
        self.tar = work / f"{rows.number:0{SHARD_DIGITS}d}.tar"
        self.parquet = self.tar.with_suffix(".parquet")
        self._rows, self._config, self._handled = rows, config, handled
        self._resize = Resize(config)
        self._samples = SortedTar(self.tar.with_suffix(".spool"))
        self._fates: list[RowOutcome | None] = [None] * len(rows)
        self._arrived: _Arrived | None = None
        self._disk_error: OSError | None = None

    def __call__(self, stream: Any, _: object = None) -> tuple:
        """What img2dataset asks of a resizer: content, width, height, original width and height, error."""
        content = stream.getvalue()
        try:
            return (*self._look_at(content), None)
        except FetchError as error:
            return (*[None] * 5, str(error))
        except Exception as error:
            return (*[None] * 5, f"undecodable: {type(error).__name__}: {error}")
        finally:
            self._handled(len(content))

    def write(self, _image: bytes | None, key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """What img2dataset asks of a writer. That the disk does not take a sample is raised by `close`."""
        row = self._rows.row(key)
        arrived, self._arrived = self._arrived, None
        try:
            if meta["status"] == _FAILED_TO_DOWNLOAD:
                self._fates[row] = self._failed(row, meta["error_message"])
            else:
                self._fates[row] = self._let_in(row, arrived or _Arrived({}), meta["error_message"])
        except OSError as error:
            self._disk_error = error
        except Exception as error:
            self._fates[row] = self._failed(row, f"other: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Write tar and parquet. Raises `ShardError` when the disk did not take a sample."""
        if self._disk_error:
            raise ShardError(f"{self.tar.name}: a sample could not be written ({self._disk_error})")
        lost = "no_record: img2dataset did not say what became of it"
        fates = [fate or self._failed(row, lost) for row, fate in enumerate(self._fates)]
        self._samples.write(self.tar)
        self._rows.write(self.parquet, fates, exif=self._config.extract_exif)

    def _look_at(self, content: bytes) -> Resized:
        digests = {name: hashlib.new(name, content).hexdigest() for name in self._rows.digests}
        self._arrived = arrived = _Arrived(digests)
        facts = inspect(content, self._config)
        pixels = decode(content, facts)
        arrived.flags = facts.flags
        arrived.phash = phash(pixels)
        arrived.resized = self._resize(content, pixels, keep=facts.keep)
        if self._config.extract_exif:
            arrived.exif = exif.describe(content)
        return arrived.resized

    def _let_in(self, row: int, arrived: _Arrived, error: str | None) -> RowOutcome:
        fate = RowOutcome(
            _SUCCESS if arrived.resized else _FAILED_TO_RESIZE,
            exif=arrived.exif,
            sha256=arrived.digests.get("sha256"),
            phash=arrived.phash,
            flags=(*self._flags(row), *arrived.flags),
        )
        if arrived.resized is None:
            return replace(fate, error_message=_message(error or "other: img2dataset gave neither image nor error"))
        if differs := self._differs(row, arrived):
            if not self._forgives(row, differs):
                said = f"{HASH_MISMATCH}: other {', '.join(differs)} than the list expects"
                return replace(fate, status=_FAILED_TO_DOWNLOAD, error_message=said)
            fate = replace(fate, flags=(*fate.flags, HASH_MISMATCH))
        content, *sizes = arrived.resized
        fate = replace(fate, **dict(zip(("width", "height", "original_width", "original_height"), sizes, strict=True)))
        members = {
            self._config.encode_format: content,
            "txt": self._rows.text("caption", row).encode(),
            "json": self._rows.note(row, fate, exif=self._config.extract_exif),
        }
        self._samples.add(self._rows.key(row), members)
        return fate

    def _failed(self, row: int, message: str) -> RowOutcome:
        message = self._rows.hopeless.get(row, message)
        return RowOutcome(_FAILED_TO_DOWNLOAD, _message(message), flags=self._flags(row))

    def _flags(self, row: int) -> tuple[str, ...]:
        return (CAPTION_CLEANED,) if row in self._rows.cleaned else ()

    def _differs(self, row: int, arrived: _Arrived) -> list[str]:
        """The hashes that the list holds for this row and that its answer does not have."""
        if self._config.hash_check == "off":
            return []
        expected = self._rows.expected(row)
        differs = [name for name, digest in arrived.digests.items() if expected.get(name, digest) != digest]
        picture = expected.get("phash")
        if picture is not None and (arrived.phash is None or distance(picture, arrived.phash) > NEAR_BITS):
            differs.append("phash")
        return differs

    def _forgives(self, row: int, differs: list[str]) -> bool:
        """Whether a sample with other hashes is kept."""
        if self._config.hash_check == "perceptual":
            return "phash" not in differs and "phash" in self._rows.expected(row)
        return self._config.hash_check == "warn"


def _message(said: str) -> str:
    return said[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
