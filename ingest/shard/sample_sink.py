"""Writes samples into a shard, in the place of img2dataset's resizer and sample writer.

img2dataset's `Downloader` calls two objects for each response, one after the other in the same thread: one resizes the image,
one writes the sample. `SampleSink` is passed to it as both; so it sees the bytes, the image and the row, and decides what is
stored. Every row gets an outcome.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingest.shard.images import decode, describe_exif, read_header
from ingest.shard.phash import NEAR_BITS, distance, phash
from ingest.shard.resize import Resize, Resized
from ingest.shard.rows import CAPTION_CLEANED, RowOutcome, Rows
from ingest.shard.tar_writer import SortedTar
from roclip.config import IngestConfig
from roclip.data.outcomes import FetchError
from roclip.data.shards import SHARD_DIGITS
from roclip.errors import ShardError

HASH_MISMATCH = "hash_mismatch"
"""Flag of a sample that was kept although its hashes differ from the list's, and the reason of one that was not kept."""
MAX_MESSAGE_CHARS = 1000
_FAILED_TO_DOWNLOAD, _FAILED_TO_RESIZE, _SUCCESS = "failed_to_download", "failed_to_resize", "success"


@dataclass
class _FetchedImage:
    """The results so far for the image that is being processed."""

    digests: dict[str, str]
    """`sha256`, and `md5` if the list expects one."""
    exif: str | None = None
    phash: int | None = None
    flags: tuple[str, ...] = ()
    resized: Resized | None = None


class SampleSink:
    """Resizer and sample writer of one shard, for img2dataset's `Downloader`.

    Args:
        rows: The rows of the shard.
        work: An existing folder, which holds `<shard>.tar` and `<shard>.parquet` after `close`.
        config: The ingest settings.
        release_body: Called with the size of each body in bytes, once it is no longer needed.
    """

    def __init__(self, rows: Rows, work: Path, config: IngestConfig, release_body: Callable[[int], None]):
        self.tar = work / f"{rows.number:0{SHARD_DIGITS}d}.tar"
        self.parquet = self.tar.with_suffix(".parquet")
        self._rows, self._config, self._release_body = rows, config, release_body
        self._resize = Resize(config)
        self._samples = SortedTar(self.tar.with_suffix(".spool"))
        self._outcomes: list[RowOutcome | None] = [None] * len(rows)
        self._current_image: _FetchedImage | None = None
        self._disk_error: OSError | None = None

    def __call__(self, stream: Any, _: object = None) -> tuple:
        """img2dataset's resizer interface: returns content, width, height, original width, original height and error."""
        content = stream.getvalue()
        try:
            return (*self._process(content), None)
        except FetchError as error:
            return (*[None] * 5, str(error))
        except Exception as error:
            return (*[None] * 5, f"undecodable: {type(error).__name__}: {error}")
        finally:
            self._release_body(len(content))

    def write(self, _image: bytes | None, key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """img2dataset's writer interface. A disk error is raised later, by `close`."""
        row = self._rows.row(key)
        image, self._current_image = self._current_image, None
        try:
            if meta["status"] == _FAILED_TO_DOWNLOAD:
                self._outcomes[row] = self._failed(row, meta["error_message"])
            else:
                self._outcomes[row] = self._store(row, image or _FetchedImage({}), meta["error_message"])
        except OSError as error:
            self._disk_error = error
        except Exception as error:
            self._outcomes[row] = self._failed(row, f"other: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Write tar and parquet. Raises `ShardError` if a sample could not be written."""
        if self._disk_error:
            raise ShardError(f"{self.tar.name}: a sample could not be written ({self._disk_error})")
        lost = "no_record: img2dataset reported nothing for this row"
        outcomes = [outcome or self._failed(row, lost) for row, outcome in enumerate(self._outcomes)]
        self._samples.write(self.tar)
        self._rows.write(self.parquet, outcomes, exif=self._config.extract_exif)

    def _process(self, content: bytes) -> Resized:
        digests = {name: hashlib.new(name, content).hexdigest() for name in self._rows.digests}
        self._current_image = image = _FetchedImage(digests)
        header = read_header(content, self._config)
        pixels = decode(content, header)
        image.flags = header.flags
        image.phash = phash(pixels)
        image.resized = self._resize(content, pixels, keep=header.keep)
        if self._config.extract_exif:
            image.exif = describe_exif(content)
        return image.resized

    def _store(self, row: int, image: _FetchedImage, error: str | None) -> RowOutcome:
        outcome = RowOutcome(
            _SUCCESS if image.resized else _FAILED_TO_RESIZE,
            exif=image.exif,
            sha256=image.digests.get("sha256"),
            phash=image.phash,
            flags=(*self._flags(row), *image.flags),
        )
        if image.resized is None:
            return replace(outcome, error_message=_message(error or "other: img2dataset gave neither image nor error"))
        if mismatches := self._mismatches(row, image):
            if not self._tolerates(row, mismatches):
                text = f"{HASH_MISMATCH}: other {', '.join(mismatches)} than the list expects"
                return replace(outcome, status=_FAILED_TO_DOWNLOAD, error_message=text)
            outcome = replace(outcome, flags=(*outcome.flags, HASH_MISMATCH))
        content, *sizes = image.resized
        outcome = replace(
            outcome, **dict(zip(("width", "height", "original_width", "original_height"), sizes, strict=True))
        )
        members = {
            self._config.encode_format: content,
            "txt": self._rows.text("caption", row).encode(),
            "json": self._rows.metadata_json(row, outcome, exif=self._config.extract_exif),
        }
        self._samples.add(self._rows.key(row), members)
        return outcome

    def _failed(self, row: int, message: str) -> RowOutcome:
        message = self._rows.skipped.get(row, message)
        return RowOutcome(_FAILED_TO_DOWNLOAD, _message(message), flags=self._flags(row))

    def _flags(self, row: int) -> tuple[str, ...]:
        return (CAPTION_CLEANED,) if row in self._rows.cleaned else ()

    def _mismatches(self, row: int, image: _FetchedImage) -> list[str]:
        """The names of the hashes in the list that differ from the fetched image's."""
        if self._config.hash_check == "off":
            return []
        expected = self._rows.expected(row)
        mismatches = [name for name, digest in image.digests.items() if expected.get(name, digest) != digest]
        expected_phash = expected.get("phash")
        if expected_phash is not None and (image.phash is None or distance(expected_phash, image.phash) > NEAR_BITS):
            mismatches.append("phash")
        return mismatches

    def _tolerates(self, row: int, mismatches: list[str]) -> bool:
        """Whether a sample with these mismatches is kept."""
        if self._config.hash_check == "perceptual":
            return "phash" not in mismatches and "phash" in self._rows.expected(row)
        return self._config.hash_check == "warn"


def _message(text: str) -> str:
    return text[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
