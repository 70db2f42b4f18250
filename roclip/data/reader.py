"""Reads samples of sealed shards by their index, and decodes untrusted images."""

import io
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from roclip.data.cache import ShardCache, ShardUnreadableError, read_patiently
from roclip.data.shards import ShardRecord, read_index, tar_path
from roclip.errors import DataError

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before decoding (Pillow's own limit)."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Pillow formats that are read, whatever the suffix; some of its other readers start programs or are rarely tested."""
OPEN_SHARDS = 128
"""Maximum number of shards whose file and index a process keeps open."""
MAX_CAPTION_CHARS = 2048
"""Captions are cut to this: no model reads further, and a tokenizer's time is quadratic in the length of a word."""
_COLUMNS = ("key", "id", "image_offset", "image_size", "caption_offset", "caption_size", "json_offset", "json_size")


class BadSampleError(DataError):
    """A sample cannot be read; the message is the reason under which it is counted."""


class Readers:
    """Readers of a snapshot's shards, opened on demand; the `OPEN_SHARDS` most recently used stay open."""

    def __init__(
        self, root: Path, records: Sequence[ShardRecord], cache: ShardCache | None = None, caption_key: str = ""
    ):
        self.root, self.records, self.cache, self.caption_key = root, records, cache, caption_key
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __getitem__(self, shard: int) -> "ShardReader":
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            self._open[shard] = ShardReader(self.root, self.records[shard], self.cache, self.caption_key)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[shard]


class ShardReader:
    """Random access to the samples of one sealed shard through its index.

    Args:
        cache: Local cache for a shard on a store; without one each read is a range request.
        caption_key: Key of the json member that holds the captions; if empty, the txt member is read.
    """

    def __init__(self, root: Path, record: ShardRecord, cache: ShardCache | None = None, caption_key: str = ""):
        self.root, self.record, self.caption_key = root, record, caption_key
        self._tar = tar_path(root, record)
        self.cache = None if isinstance(self._tar, Path) else cache
        self._index: dict[str, list] | None = None
        self._file: io.BufferedReader | None = None
        self._problem = ""

    @property
    def index(self) -> dict[str, list]:
        """Columns key, image_offset, image_size, caption_offset, caption_size; if stored, id, json_offset and json_size."""
        if self._index is not None:
            return self._index
        self._index = index = read_index(self.root, self.record.name, _COLUMNS).to_pydict()
        return index

    def key(self, sample: int) -> str:
        return self.index["key"][sample]

    def id(self, sample: int) -> int:
        """Return the sample's id in training."""
        return self.index["id"][sample] if "id" in self.index else int(self.key(sample))

    def read(self, sample: int) -> tuple[bytes, str]:
        """Return the encoded image and its first caption. Raises `BadSampleError`."""
        return self.image(sample), self.captions(sample)[0]

    def image(self, sample: int) -> bytes:
        """Return the encoded image. Raises `BadSampleError`."""
        return self._member("image", sample)

    def captions(self, sample: int) -> list[str]:
        """Return the txt member, or the captions in the json member under `caption_key`: at least one.

        Raises `BadSampleError`.
        """
        if self.caption_key:
            return _captions_of(self._member("json", sample), self.caption_key)
        try:
            caption = self._member("caption", sample).decode().strip()
        except UnicodeDecodeError as error:
            raise BadSampleError("caption_not_utf8") from error
        if not caption:
            raise BadSampleError("empty_caption")
        return [caption[:MAX_CAPTION_CHARS]]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _member(self, kind: str, sample: int) -> bytes:
        if f"{kind}_size" not in self.index:
            raise BadSampleError(f"no_{kind}")
        offset, size = (self.index[f"{kind}_{column}"][sample] for column in ("offset", "size"))
        if not offset:  # no member starts at 0, where the first header is
            raise BadSampleError(f"no_{kind}")
        return self._read_range(offset, size)

    def _read_range(self, offset: int, size: int) -> bytes:
        if self._problem:
            raise BadSampleError(self._problem)
        try:
            if isinstance(self._tar, Path) or self.cache:
                piece = self._from_file(offset, size)
            else:
                piece = read_patiently(lambda: self._from_store(offset, size))
        except ShardUnreadableError as error:
            self._problem = str(error)
            raise BadSampleError(self._problem) from error
        except OSError as error:
            raise BadSampleError("shard_not_readable") from error
        if len(piece) < size:
            raise BadSampleError("truncated_tar")
        return piece

    def _from_file(self, offset: int, size: int) -> bytes:
        if self._file is None:
            path = self.cache.get(self.root, self.record) if self.cache else self._tar
            self._file = path.open("rb")
        self._file.seek(offset)
        return self._file.read(size)

    def _from_store(self, offset: int, size: int) -> bytes:
        store: Any = self._tar
        piece = store.fs.cat_file(store.path, start=offset, end=offset + size)
        if len(piece) > size:  # a web server without range support sends the whole file
            piece = piece[offset : offset + size]
        if len(piece) < size:
            raise ShardUnreadableError("truncated_tar")
        return piece

    def __del__(self):
        self.close()


def _captions_of(content: bytes, key: str) -> list[str]:
    """Return the caption or captions of a json object under a key, without empty ones."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken_json") from error
    value = found.get(key) if isinstance(found, dict) else None
    captions = [each.strip() for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    if not any(captions):
        raise BadSampleError("no_caption")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which json may hold and tokenizers reject
        raise BadSampleError("caption_not_utf8") from error
    return [caption[:MAX_CAPTION_CHARS] for caption in captions if caption]


def decode(encoded: bytes, size: int) -> np.ndarray:
    """Decode an image to (size, size, 3) uint8, resized if necessary.

    Pillow reads the header, so that a decompression bomb is refused before decoding. A complete JPEG is then decoded by
    OpenCV, at the smallest of libjpeg's scales (1/2, 1/4, 1/8) with enough pixels, which takes half of Pillow's time for the
    same bits. All else, and a truncated JPEG, is decoded by Pillow, which reports what it cannot read. Raises
    `BadSampleError`.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadSampleError("too_many_pixels")
            if image.format == "JPEG" and image.mode in ("RGB", "L") and encoded.rstrip(b"\0").endswith(b"\xff\xd9"):
                pixels = _decode_jpeg(encoded, min(image.size) // size)
            else:
                pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadSampleError("undecodable_image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # where warnings are errors
        raise BadSampleError("too_many_pixels") from error
    if pixels.shape[:2] == (size, size):
        return pixels
    shrinks = min(pixels.shape[:2]) > size
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _decode_jpeg(encoded: bytes, max_factor: int) -> np.ndarray:
    """Decode to RGB, reduced by the largest of libjpeg's factors that is at most `max_factor`."""
    scales = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))
    flags = next((flags for factor, flags in scales if max_factor >= factor), cv2.IMREAD_COLOR)
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise BadSampleError("undecodable_image")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
